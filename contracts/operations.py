"""What a stage computes with its model, as planned: the numbers from which its time is predicted. No torch."""

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from contracts.model_size import Size

OperationKind: TypeAlias = Literal["sampling", "scoring", "training"]
BYTES_PER_TOKEN = 4
"""Bytes of a text for each of its tokens, as is usual for English."""


@dataclass(frozen=True)
class ModelLayout:
    """How a model is spread over processes, one device each."""

    dp: int = 1
    """Copies: data parallel, or replicas of an engine or of a scorer."""
    tp: int = 1
    pp: int = 1
    sp: int = 1
    zero: int | str = 0
    """Sharding over the dp · sp processes: 0 to 3, or fsdp2."""
    offload: tuple[str, ...] = ()
    nodes: int = 1

    @property
    def processes(self) -> int:
        """All of them."""
        return self.dp * self.tp * self.pp * self.sp


@dataclass(frozen=True)
class Operations:
    """What a stage computes with its model. Counts are those of the plan: answers are taken to be as long as allowed,
    prompts to have their mean length, four bytes a token."""

    kind: OperationKind
    model: Size
    number: int
    """Bytes of a number that is computed with."""
    layout: ModelLayout
    sequences: int
    """Answers, or rows of a training."""
    prompt_tokens: int
    """Tokens of prompts; one that several answers share counts once where it is computed once."""
    answer_tokens: int
    length: int
    """Tokens that attention looks back on from the last token of a sequence."""
    logits: int
    """Positions whose logits are computed."""
    batch: int
    """Sequences at a time in one copy (sampling), or tokens of a forward pass (otherwise)."""
    passes: int = 1
    """Epochs."""
    steps: int = 0
    """Optimizer steps."""
    trained: int = 0
    """Parameters that are trained."""
    recomputes: bool = False
    """Whether activations are computed again in the backward pass."""
    beside: int = 0
    """Further models of the same shape that only look at the same tokens."""

    @property
    def tokens(self) -> int:
        """Tokens of a pass."""
        return self.prompt_tokens + self.answer_tokens


def shape_of(size: Size) -> Size:
    """A model's measures without those of its files."""
    return replace(size, tensors={}, other_files=0, context=None)
