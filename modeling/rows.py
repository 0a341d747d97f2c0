"""Training rows: the token ids of a prompt and its responses, without text or padding."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Response:
    """A response's token ids. It ends where `ids` ends, regardless of the last token's value."""

    ids: Ids
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Per-response inputs of the loss, for example a reference log-probability."""
    tokens: dict[str, Floats] = field(default_factory=dict)
    """Per-token inputs of the loss, for example advantages; each as long as `ids`."""


@dataclass(frozen=True)
class Row:
    """The unit of a global batch, never split over processes: a demonstration, a pair, or a prompt with its samples."""

    row_id: str
    prompt: Ids
    """At least one token, because a response's first token needs a predecessor."""
    responses: tuple[Response, ...]
    tags: tuple[str, ...] = ()
    """Tags of the prompt."""

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sequence."""
        return len(self.prompt) + max(len(response.ids) for response in self.responses)

    @property
    def response_tokens(self) -> int:
        """The number of tokens of all responses."""
        return sum(len(response.ids) for response in self.responses)

    @property
    def tokens(self) -> int:
        """The number of tokens of all sequences, with the prompt counted in each."""
        return self.response_tokens + len(self.prompt) * len(self.responses)


def token_ids(ids: Iterable[int]) -> Ids:
    """Token ids as a NumPy array."""
    return np.fromiter(ids, dtype=np.int64)


def float_values(values: Iterable[float]) -> Floats:
    """Per-token values as a NumPy array."""
    return np.fromiter(values, dtype=np.float32)
