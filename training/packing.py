"""Packed batches."""

from typing import NamedTuple

from torch import Tensor


class Packed(NamedTuple):
    """A micro-batch as the model sees it."""

    input_ids: Tensor
