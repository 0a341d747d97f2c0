"""The interface of training engines: a model and its optimizer, distributed over processes.

Every method is a collective: all processes of a training call the same methods in the same order.
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
from training.slices import WeightSlices

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Timeout of a collective."""
Outputs = dict[str, Tensor]
"""The outputs of a module for a `Packed` batch, for example logprobs [N]."""
Share = Callable[[Outputs, int], Metrics]
"""`share(outputs, number)`: this micro-batch's share in each metric of the step, `loss` among them."""


class TrainingEngine(ABC):
    """A model and its optimizer, distributed over processes.

    A global batch is divided over `replicas` data parallel ranks; each is one process, or a group of processes (tensor,
    pipeline and sequence parallel) that computes its micro-batches together.
    """

    device: torch.device
    rank: int
    world_size: int
    replicas: int
    """Data parallel size: the number of shares that a global batch is divided into."""
    replica: int
    """This process's data parallel rank."""
    optimizer: Any
    """Set by `prepare`: torch's optimizer, or accelerate's wrapper of it."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files."""
        return self.rank == 0

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The actual parallel layout, for the manifest."""

    @abstractmethod
    def prepare(
        self,
        module: nn.Module,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        slices: WeightSlices | None = None,
    ) -> None:
        """Distribute `module` over the processes; `make_optimizer` gets the parameters that this process updates.

        With `slices` the module's parameters are on the meta device, and each process reads what it keeps of them.
        """

    @abstractmethod
    def forward(self, batch: Packed) -> Outputs:
        """The module's outputs, without gradients; under pipeline parallelism broadcast from the last stage."""

    @abstractmethod
    def accumulate(self, batches: Sequence[Packed], share: Share) -> dict[str, Tensor]:
        """Gradient accumulation: forward and backward of this replica's micro-batches, then one gradient reduction.

        Returns the sum of the shares over `batches` (without gradients, fp64). Each replica's `loss` is its share of
        the step's loss: gradients are summed over replicas, not averaged.
        """

    @abstractmethod
    def evaluate(self, batches: Sequence[Packed], share: Share) -> dict[str, Tensor]:
        """The sum of the shares over `batches`, without gradients."""

    @abstractmethod
    def clip(self, max_norm: float) -> float:
        """Clip the gradients to the global norm `max_norm`; returns the norm before clipping."""

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the next step; called before its `accumulate`."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @abstractmethod
    def step(self) -> None:
        """Run one optimizer step, after which the gradients are zero."""

    def all_reduce_metrics(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """All-reduce metrics over the replicas: floats for scalars, CPU tensors for vectors.

        All replicas must pass the same names in the same order.
        """
        if not metrics:
            return {}
        values = [torch.as_tensor(value, dtype=torch.float64).detach().cpu() for value in metrics.values()]
        whole = self.all_reduce(torch.cat([value.flatten() for value in values]))
        sums = whole.split([value.numel() for value in values])
        return {
            name: found if value.ndim else found.item()
            for name, value, found in zip(metrics, values, sums, strict=True)
        }

    @abstractmethod
    def all_reduce(self, values: Tensor) -> Tensor:
        """All-reduce (sum) a tensor over the replicas; the result is on the CPU."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for all processes."""

    @abstractmethod
    def gather_weights(self) -> dict[str, Tensor]:
        """Gather all weights of the module by name, unsharded; only valid in the main process."""

    # Saving and restoring the training state: unsharded fp32 tensors of each trained parameter.

    needs_step_before_write: bool = False
    """Whether `write` needs a previous optimizer step (whose result it overwrites)."""
    master_copies: bool = False
    """Whether the engine keeps fp32 master weights itself, so that the model is loaded in the training dtype."""

    @abstractmethod
    def trained_shapes(self) -> Shapes:
        """Name and unsharded shape of every trained parameter."""

    @abstractmethod
    def read(self, name: str, state_names: tuple[str, ...]) -> list[Tensor]:
        """Master weights and moments (`state_names[1:]`, torch's names; zeros before the first step) of a parameter.

        Unsharded in the main process; unspecified in the others.
        """

    @abstractmethod
    def set_weights(self, name: str, weights: Tensor) -> None:
        """Replace the master weights of a trained parameter by an unsharded fp32 tensor, before the first step."""

    @abstractmethod
    def write(self, name: str, tensors: dict[str, Tensor], steps: int) -> None:
        """Replace master weights and moments of a parameter by unsharded tensors: the state after `steps` steps."""


def node_count() -> int:
    """The number of nodes, from torch's launcher."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def add_shares(metrics: dict[str, Tensor], shares: Metrics) -> None:
    """Add a micro-batch's shares to the sums in `metrics` (fp64, without gradients)."""
    for name, share in shares.items():
        metrics[name] = metrics.get(name, 0.0) + share.detach().double()
