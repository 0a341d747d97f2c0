"""How one model is spread over processes: what can be declared, and what is refused. Without torch."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from contracts.config import Section, runtime
from contracts.errors import UserError

LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
"""Architectures whose layers tensor and pipeline parallelism know, by the beginnings of their classes' names."""
HEADS = ("ForCausalLM", "ForSequenceClassification")


class ParallelConfig(Section):
    """Processes of a model: dp · tp · pp of them, one device each."""

    dp: int = runtime(1, ge=1)
    """Data parallel: a batch is divided into this many parts."""
    tp: int = runtime(1, ge=1)
    """Tensor parallel: every layer's matrices are divided into this many parts."""
    pp: int = runtime(1, ge=1)
    """Pipeline parallel: the layers are divided into this many stages."""
    sp: int = runtime(1, ge=1)
    """Sequence parallel: only 1."""
    zero: Literal[0, 1, 2, 3, "fsdp2"] = runtime(0)
    """What the dp processes share out: 1: optimizer, 2: gradients too, 3: weights too (DeepSpeed); fsdp2: all three."""
    offload: list[Literal["optimizer", "param"]] = runtime([])
    """What DeepSpeed keeps in the machine's memory instead of the GPU's."""

    @property
    def processes(self) -> int:
        """How many there are in all."""
        return self.dp * self.tp * self.pp * self.sp

    @property
    def deepspeed_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
        return self.zero if isinstance(self.zero, int) else 0

    @property
    def is_native(self) -> bool:
        """Whether torch's own parts spread the model, instead of accelerate."""
        return self.zero == "fsdp2" or self.tp > 1 or self.pp > 1

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        if self.deepspeed_stage and (self.tp > 1 or self.pp > 1):
            raise ValueError(
                f"zero: {self.zero} with tp: {self.tp} and pp: {self.pp}: DeepSpeed's ZeRO is combined with data "
                "parallelism only. Set zero to fsdp2, which shards as ZeRO-3 does, or tp and pp to 1."
            )
        if self.offload and not self.deepspeed_stage:
            raise ValueError(f"offload: {self.offload} needs DeepSpeed: set zero to 1, 2 or 3, or offload to [].")
        if "param" in self.offload and self.zero != 3:
            raise ValueError(
                f"offload: [param] with zero: {self.zero}: only ZeRO-3 can offload weights. Set zero to 3."
            )
        return self


def check_layout(parallel: ParallelConfig, model: Path) -> None:
    """Check that a model can be divided as declared, by its config.json alone.

    Raises:
        UserError: it cannot; the message says which number is in the way.
    """
    if parallel.tp == 1 and parallel.pp == 1:
        return
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in {family + head for family in LLAMA_LIKE for head in HEADS}:
        raise UserError(
            f"{model} is a {architecture}; tensor and pipeline parallelism know {', '.join(LLAMA_LIKE)} models. Set "
            "parallel.tp and parallel.pp to 1, and parallel.zero to 3 or fsdp2 to shard this one."
        )
    layers = int(config["num_hidden_layers"])
    if parallel.pp > layers:
        raise UserError(f"parallel.pp is {parallel.pp}, but {model} has {layers} layers; set it to at most {layers}.")
    heads = int(config["num_attention_heads"])
    widths = {
        "num_attention_heads": heads,
        "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
        "intermediate_size": int(config["intermediate_size"]),
    }
    for name, width in widths.items():
        if width % parallel.tp:
            raise UserError(
                f"parallel.tp is {parallel.tp}, which does not divide {name} ({width}) of {model}. Set it to a divisor."
            )
