"""What the training loop asks of the processes that it runs on.

Every process of a training makes the same calls in the same order, and all of them return in all processes.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from modeling.loading import Shapes
from modeling.packing import Packed
from training.algorithm import Metrics

COLLECTIVE_DEADLINE = timedelta(minutes=30)
"""How long a process waits for the others in one collective before it gives up."""
Outputs = dict[str, Tensor]
"""What a trained module returns for a `Packed` batch, for example logprobs [N]."""
Share = Callable[[Outputs, int], Metrics]
"""`share(outputs, number)`: this micro-batch's share in each metric of the step, `loss` among them."""


class TrainingEngine(ABC):
    """A model, its optimizer, and the processes that they are spread over.

    A batch is divided over `replicas` groups of processes; the processes of one group (tensor, pipeline and sequence
    parallel) compute the same micro-batches together.
    """

    device: torch.device
    rank: int
    world_size: int
    replicas: int
    """Number of different shares that a batch is divided into (data parallel)."""
    replica: int
    """Which of them this process computes."""
    optimizer: Any
    """What `prepare` has made: torch's, or accelerate's around it."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The layout that really runs, for the manifest."""

    @abstractmethod
    def prepare(self, module: nn.Module, make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        """Spread `module` over the processes; `make_optimizer` gets the parameters that this process updates."""

    @abstractmethod
    def forward(self, batch: Packed) -> Outputs:
        """The module's outputs, without gradients; under pipeline parallelism those of the last stage, everywhere."""

    @abstractmethod
    def accumulate(self, batches: Sequence[Packed], share: Share) -> dict[str, Tensor]:
        """Add the gradients of this replica's micro-batches to those that wait for `step`; exchange them in the end.

        Returns the sum of the shares over `batches` (without gradients, fp64). Each replica's `loss` is part of one sum
        over all replicas: gradients are added up over replicas, not averaged.
        """

    @abstractmethod
    def evaluate(self, batches: Sequence[Packed], share: Share) -> dict[str, Tensor]:
        """The sum of the shares over `batches`, without gradients."""

    @abstractmethod
    def clip(self, max_norm: float) -> float:
        """Scale the gradients so that their global norm is at most `max_norm`; returns the norm before."""

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step; called before its `accumulate`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @abstractmethod
    def step(self) -> None:
        """One optimizer step; gradients are zero afterwards."""

    def add_up(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The sum of each metric over the replicas, in every process: a float, or of a vector a vector on the CPU.

        All must give the same names in one order.
        """
        if not metrics:
            return {}
        values = [torch.as_tensor(value, dtype=torch.float64).detach().cpu() for value in metrics.values()]
        whole = self.sum(torch.cat([value.flatten() for value in values]))
        sums = whole.split([value.numel() for value in values])
        return {
            name: found if value.ndim else found.item()
            for name, value, found in zip(metrics, values, sums, strict=True)
        }

    @abstractmethod
    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum of a tensor over the replicas, on the CPU, in every process."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all processes."""

    @abstractmethod
    def whole_weights(self) -> dict[str, Tensor]:
        """All weights of the module under their names, whole; in other processes than the main one perhaps empty."""

    # To save and restore the state of a training: whole fp32 tensors of each trained parameter.

    needs_a_step_before_write: bool = False
    """Whether `write` works only after an optimizer step, whose result it replaces."""
    master_copies: bool = False
    """Whether the engine keeps fp32 master weights itself, so that the model is loaded in the training's dtype."""

    @abstractmethod
    def trained_shapes(self) -> Shapes:
        """Name and whole shape of every trained parameter, the same in all processes."""

    @abstractmethod
    def read(self, name: str, kinds: tuple[str, ...]) -> list[Tensor]:
        """Master weights and moments (`kinds[1:]`, by torch's names; zeros before the first step) of a parameter.

        The main process gets whole tensors; what the others get is unspecified.
        """

    @abstractmethod
    def set_weights(self, name: str, weights: Tensor) -> None:
        """Replace the master weights of a trained parameter by a whole fp32 tensor, before the first step."""

    @abstractmethod
    def write(self, name: str, tensors: dict[str, Tensor], steps: int) -> None:
        """Replace master weights and moments of a parameter by whole tensors, after `steps` steps."""


def nodes() -> int:
    """The machines that the processes were started on, as torch's launcher counts them."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def add_shares(metrics: dict[str, Tensor], shares: Metrics) -> None:
    """Add a micro-batch's shares to the sums in `metrics` (fp64, without gradients)."""
    for name, share in shares.items():
        metrics[name] = metrics.get(name, 0.0) + share.detach().double()
