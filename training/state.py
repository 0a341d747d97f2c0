"""Continuing a killed training inside its stage: parameters, moments and the log, in one file written atomically.

What a crash can leave is the last file or the one before it, whole. Nothing in the loop is random, so a continued
training equals an uninterrupted one bit for bit. safetensors and JSON only: no pickle is ever read.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


class TrainingState:
    """The saved state of one training; every process reads it, rank 0 writes it."""

    def __init__(self, path: Path, model: torch.nn.Module, optimizer: Any, *, every: int | None, writes: bool) -> None:
        """`path` lies in the stage's hidden directory, which only this very configuration uses."""
        self.path = path
        self.every = every
        self.writes = writes
        self.optimizer = optimizer
        self.resumed_steps = 0
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def save(self, log: list[dict[str, float | int]]) -> None:
        """Replace the saved state, if one is due after `len(log)` steps."""
        if not self.writes or self.every is None or len(log) % self.every:
            return
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"parameter/{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        self.path.parent.mkdir(exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".tmp")
        save_file({name: value.contiguous() for name, value in tensors.items()}, scratch, {"log": json.dumps(log)})
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, self.path)

    def resume(self) -> list[dict[str, float | int]]:
        """Restore the saved state, if there is one, and return the log of the steps that it holds."""
        if not self.path.is_file():
            return []
        with safe_open(self.path, "pt") as file, torch.no_grad():
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                kind, _, name = key.partition("/")
                parameter = self.parameters[name]
                value = file.get_tensor(key)
                if kind == "parameter":
                    parameter.copy_(value)
                else:
                    # AdamW keeps its step counter on the CPU and its moments beside the parameter.
                    place = value.device if value.ndim == 0 else parameter.device
                    self.optimizer.state[parameter][kind] = value.to(place)
            log: list[dict[str, float | int]] = json.loads(file.metadata()["log"])
        self.resumed_steps = len(log)
        return log
