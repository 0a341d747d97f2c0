"""The planned computation of a stage with its model, from which its time is predicted. Does not import torch."""

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from contracts.model_size import Size

OperationKind: TypeAlias = Literal["sampling", "scoring", "training"]
BYTES_PER_TOKEN = 4
"""Bytes of text per token, as is typical of English."""


@dataclass(frozen=True)
class ModelLayout:
    """How a model is spread over processes, one device each."""

    dp: int = 1
    """Number of copies: data parallel ranks, or replicas of an engine or of a scorer."""
    tp: int = 1
    pp: int = 1
    sp: int = 1
    zero: int | str = 0
    """Sharding over the dp · sp processes: 0 to 3, or fsdp2."""
    offload: tuple[str, ...] = ()
    nodes: int = 1

    @property
    def processes(self) -> int:
        """The total number of processes."""
        return self.dp * self.tp * self.pp * self.sp


@dataclass(frozen=True)
class Operations:
    """The planned computation of a stage with its model. Counts assume answers of the maximum length, and prompts of
    their mean length at four bytes per token."""

    kind: OperationKind
    model: Size
    number: int
    """Bytes per number of the dtype that is computed in."""
    layout: ModelLayout
    sequences: int
    """Number of answers, or of a training's rows."""
    prompt_tokens: int
    """Prompt tokens; a prompt that several answers share counts once if it is computed once."""
    answer_tokens: int
    length: int
    """Tokens that the last token of a sequence attends to."""
    logits: int
    """Number of positions whose logits are computed."""
    batch: int
    """Concurrent sequences in one copy (sampling), or tokens of a forward pass (otherwise)."""
    passes: int = 1
    """Number of epochs."""
    steps: int = 0
    """Number of optimizer steps."""
    trained: int = 0
    """Number of trained parameters."""
    recomputes: bool = False
    """Whether activations are recomputed in the backward pass."""
    forward_models: int = 0
    """Number of further models of the same shape that only do forward passes over the same tokens."""

    @property
    def tokens(self) -> int:
        """Tokens of one pass."""
        return self.prompt_tokens + self.answer_tokens


def shape_of(size: Size) -> Size:
    """A model's dimensions, without the details of its files."""
    return replace(size, tensors={}, other_files=0, context=None)
