"""Parallel layouts: the config section `parallel`, and the checks of a layout against a model. No torch."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from contracts.config import Section, expand_home, runtime
from contracts.errors import UserError
from contracts.models import architecture_of
from training.layout_files import read_layout

LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
"""Architectures that tensor, pipeline and sequence parallelism support, by the prefixes of their class names."""
HEADS = ("ForCausalLM", "ForSequenceClassification")


class ParallelConfig(Section):
    """Processes of a training, one device each: dp · tp · pp · sp. Or the path of an accelerate or DeepSpeed file."""

    dp: int = runtime(1, ge=1)
    """Data parallel size."""
    tp: int = runtime(1, ge=1)
    """Tensor parallel size: every layer's matrices are split over this many processes."""
    pp: int = runtime(1, ge=1)
    """Pipeline parallel size: the layers are split into this many pipeline stages."""
    sp: int = runtime(1, ge=1)
    """Sequence parallel size: every micro-batch's tokens are split over this many processes."""
    zero: Literal[0, 1, 2, 3, "fsdp2"] = runtime(0)
    """Sharding over the dp processes: 1: optimizer, 2: gradients too, 3: weights too (DeepSpeed); fsdp2: all three."""
    offload: list[Literal["optimizer", "param"]] = runtime([])
    """Parts that DeepSpeed offloads to CPU memory: the optimizer's state, the parameters."""
    nodes: int = runtime(1, ge=1)
    """Number of machines, with the same number of processes on each; start the command once on every one."""

    @property
    def processes(self) -> int:
        """The total number of processes."""
        return self.dp * self.tp * self.pp * self.sp

    @property
    def deepspeed_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
        return self.zero if isinstance(self.zero, int) else 0

    @property
    def is_native(self) -> bool:
        """Whether the native engine (torch's own parallelism) runs it, instead of accelerate."""
        return self.zero == "fsdp2" or self.is_divided

    @property
    def is_divided(self) -> bool:
        """Whether tensor, pipeline or sequence parallelism is used, which not every architecture supports."""
        return self.tp > 1 or self.pp > 1 or self.sp > 1

    def __str__(self) -> str:
        """The keys that differ from their defaults, for messages."""
        return " ".join(f"{name}={value}" for name, value in self.model_dump(exclude_defaults=True).items()) or "dp=1"

    @model_validator(mode="before")
    @classmethod
    def _read_file(cls, value: Any) -> Any:
        """Replace the path of an accelerate or DeepSpeed file by the layout in it."""
        try:
            return read_layout(Path(expand_home(str(value)))) if isinstance(value, str | Path) else value
        except UserError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        if self.processes % self.nodes:
            raise ValueError(
                f"nodes={self.nodes} does not divide the {self.processes} processes (dp · tp · pp · sp). Every node "
                "runs equally many: set nodes to a divisor, or dp to a multiple."
            )
        here = self.processes // self.nodes
        if here % (self.tp * self.sp):
            raise ValueError(
                f"nodes={self.nodes} leaves {here} of {self.processes} processes on each node, which tp · sp = "
                f"{self.tp * self.sp} does not divide: tensor and sequence parallelism communicate in every layer, so "
                "their processes stay within a node. Set tp and sp lower and dp or pp higher, or nodes lower."
            )
        if self.deepspeed_stage and self.is_divided:
            raise ValueError(
                f"zero={self.zero} with tp={self.tp}, pp={self.pp}, sp={self.sp}: DeepSpeed's ZeRO is combined with "
                "data parallelism only. Set zero to fsdp2, which shards what ZeRO-3 does, or tp, pp and sp to 1."
            )
        if self.offload and not self.deepspeed_stage:
            raise ValueError(f"offload={self.offload} with zero={self.zero}: only DeepSpeed offloads. Set zero to 3.")
        if "param" in self.offload and self.zero != 3:
            raise ValueError(
                f"offload={self.offload} with zero={self.zero}: only ZeRO-3 offloads weights. Set zero to 3."
            )
        return self


def check_layout(parallel: ParallelConfig, model: Path) -> None:
    """Check that a model supports the layout, by its config.json alone.

    Raises:
        UserError: it is not a model, or does not support the layout; the message names the number that prevents it.
    """
    if not parallel.is_divided:
        return
    architecture = architecture_of(model)
    if architecture not in {family + head for family in LLAMA_LIKE for head in HEADS}:
        raise UserError(
            f"{model} is a {architecture}; tensor, pipeline and sequence parallelism support {', '.join(LLAMA_LIKE)} "
            "models. Set parallel.tp, parallel.pp and parallel.sp to 1, and parallel.zero to 3 or fsdp2 to shard it."
        )
    config: dict[str, Any] = json.loads((model / "config.json").read_bytes())
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    if parallel.pp > layers:
        raise UserError(f"parallel.pp is {parallel.pp}, but {model} has {layers} layers. Set it to at most {layers}.")
    for name, width, key, parts in (
        ("num_attention_heads", heads, "tp · sp", parallel.tp * parallel.sp),
        ("num_key_value_heads", int(config.get("num_key_value_heads") or heads), "tp · sp", parallel.tp * parallel.sp),
        ("intermediate_size", int(config["intermediate_size"]), "tp", parallel.tp),
    ):
        if width % parts:
            raise UserError(
                f"parallel.{key} is {parts}, which does not divide {name} ({width}) of {model}. Set it to a divisor."
            )
