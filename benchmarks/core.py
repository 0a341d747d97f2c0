"""Runs Ratchet's training core as the training stages do, on a model in memory instead of a loaded one."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator

from benchmarks.side import Side
from modeling.attention import attention_on
from modeling.modes import set_modes
from modeling.modules import Trained
from training.config import CriticConfig, PolicyConfig, TrainingConfig
from training.engines import create_engine
from training.engines.accelerated import AcceleratedEngine
from training.engines.base import TrainingEngine
from training.fit import make_optimizer, set_packing
from training.loop import Learning, train
from training.models import pick_dtype, set_trainable
from training.state import Line

NOWHERE = Path("unused")
"""A placeholder for the paths of a config, because the model and the data are in memory."""


def policy_config(settings: dict[str, Any], algorithm: str, algorithm_settings: dict[str, Any]) -> PolicyConfig:
    """The config of the stage `policy` for the settings of a benchmark."""
    pairs = algorithm == "dpo"
    data = {"pairs": [NOWHERE], "reference": [NOWHERE]} if pairs else {"experience": NOWHERE}
    return PolicyConfig(algorithm=algorithm, settings=algorithm_settings, **data, **_common(settings))


def critic_config(settings: dict[str, Any]) -> CriticConfig:
    """The config of the stage `critic` for the settings of a benchmark."""
    return CriticConfig(experience=NOWHERE, **_common(settings))


def _common(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "output": NOWHERE,
        "model": NOWHERE,
        "epochs": settings.get("ppo_epochs", 1),
        "global_batch": settings["rows"],
        "learning_rate": settings["learning_rate"],
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "optimizer": settings["optimizer"],
        "weight_decay": settings["weight_decay"],
        "micro_batch_tokens": settings["micro_batch_tokens"],
    }


class Core:
    """A model with its optimizer, which can be trained repeatedly."""

    def __init__(self, config: TrainingConfig, model: Any, wrap: Callable[[Any], Trained]) -> None:
        self.config = config
        dtype = pick_dtype(config)
        self.engine: TrainingEngine = create_engine(config, dtype)
        self.attention = attention_on(self.engine.device, dtype)
        self.packing = set_packing(config, model)
        set_trainable(model, config.frozen)
        set_modes(model, config.gradient_checkpointing)
        self.engine.prepare(wrap(model), lambda parameters: make_optimizer(config, parameters))

    def train(self, learning: Learning) -> list[Line]:
        """Run the loop of all training stages, without restoring or saving training states."""
        state: Any = SimpleNamespace(read=list, due=False)
        context: Any = SimpleNamespace(progress=lambda *_: None, report_step=lambda *_: None)
        return train(self.config, context, self.engine, learning, self.packing, state)


def watch(side: Side) -> None:
    """Report the time of forward, backward and optimizer in every step."""
    for name, owner, method in (
        ("forward", Trained, "forward"),
        ("backward", Accelerator, "backward"),
        ("optimizer", AcceleratedEngine, "step"),
    ):
        setattr(owner, method, side.timed(name, getattr(owner, method)))
