"""Training engine on torch's own parallelism: data, tensor, pipeline and sequence parallel, and FSDP2.

The processes form a mesh [pp, dp · sp, tp]. Each holds its shard of the model, and reads only that from the files if it
can (`training/slices.py`):

    pp  a pipeline stage keeps some layers; the first also the embedding, the last the final norm and the head.
        `torch.distributed.pipelining` runs the 1F1B schedule.
    tp  query, key, value, gate and up projections are column-parallel, output and down projections row-parallel
        (DTensor); embedding, norms and head are replicated.
    sp  the processes of a group split each micro-batch's tokens; see `sequence.py`.
    dp  the processes of dp and sp have the same weights (zero 0), or a shard of each (fsdp2: `fully_shard`).

Under pipeline parallelism a tied head exists twice: the first and the last stage sum their gradients, so that the
copies stay equal.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from contracts.attempt import beat
from contracts.errors import UserError
from modeling.loading import Shapes
from modeling.packing import Packed
from reallocation.layouts import GlobalTensor, LocalPart, layer_bounds, part_of
from training.engines.base import COLLECTIVE_TIMEOUT, Outputs, Share, TrainingEngine, add_shares, node_count
from training.engines.pipeline import ReceivedHiddenStates, SkippedLayer, StageModule
from training.engines.sequence import NAME as SEQUENCE_PARALLEL
from training.engines.sequence import SequenceParallelGroup
from training.engines.sharding import (
    COLUMN_PARALLEL,
    HEAD_NORMS,
    ROW_PARALLEL,
    ShardedParameter,
    all_gather,
    local_tensor,
    sharded_dims,
)
from training.parallel import ParallelConfig
from training.slices import WeightSlices

FORWARD_MICRO_BATCHES = 4
"""Micro-batches per pipeline stage in one forward-only schedule; each needs its own buffers."""


class NativeEngine(TrainingEngine):
    """A model over dp x tp x pp processes."""

    def __init__(self, parallel: ParallelConfig, dtype: torch.dtype) -> None:
        """Initialize the process group and the device mesh.

        Args:
            parallel: the layout, accepted by `check_layout` for the model.
            dtype: compute dtype; weights, gradients and the optimizer's moments are fp32.

        Raises:
            UserError: the number of processes is not that of the layout.
        """
        on_gpu = torch.cuda.is_available()
        backend = "nccl" if on_gpu else "gloo"
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        if not dist.is_initialized():
            alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, **alone)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if self.world_size != parallel.processes:
            raise UserError(
                f"{self.world_size} process(es) were started, but parallel ({parallel}) declares {parallel.processes}. "
                "Start the stage without a launcher of your own."
            )
        names = ("pp", "data", "tp")
        shape = (parallel.pp, parallel.dp * parallel.sp, parallel.tp)
        self._mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        self._stage_number, self._data_rank, self._tensor_rank = (self._mesh.get_local_rank(name) for name in names)
        self.replica = self._data_rank // parallel.sp
        self._groups = {name: self._mesh.get_group(name) for name in names}
        self._parallel = parallel
        self._dtype = dtype
        self._sharded = parallel.zero == "fsdp2"
        self.replicas = parallel.dp
        self._is_last = self._stage_number == parallel.pp - 1
        firsts_and_lasts = [
            [self._rank_of(0, data, part), self._rank_of(-1, data, part)]
            for data, part in itertools.product(range(shape[1]), range(parallel.tp))
        ]
        self._tied_head_group = self._create_groups(firsts_and_lasts) if parallel.pp > 1 else None
        sharing = [
            [self._rank_of(stage, replica * parallel.sp + number, part) for number in range(parallel.sp)]
            for stage, replica, part in itertools.product(range(parallel.pp), range(parallel.dp), range(parallel.tp))
        ]
        self._sequence_group = SequenceParallelGroup(self._create_groups(sharing)) if parallel.sp > 1 else None
        self._schedules: dict[bool, tuple[tuple[int, int], Any]] = {}
        self._width = 0
        self._gradients_reduced = True

    def _rank_of(self, stage: int, data: int, part: int) -> int:
        return int(self._mesh.mesh[stage, data, part])

    def _create_groups(self, members: list[list[int]]) -> Any:
        """Create all groups, as every process must, and return the one that this process belongs to, if any."""
        groups = [dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT) for ranks in members]
        return next((group for group, ranks in zip(groups, members, strict=True) if self.rank in ranks), None)

    # Sharding the model

    def prepare(
        self,
        module: nn.Module,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        slices: WeightSlices | None = None,
    ) -> None:
        """Shard `module`, which has `model` (transformers), `hidden` and `read`."""
        whole: Any = module
        backbone = whole.model.base_model
        self._layers = layer_bounds(len(backbone.layers), self._parallel.pp)
        self._names = [name for name, value in module.state_dict().items() if isinstance(value, Tensor)]
        self._parts = self._list_parts(module, backbone)
        known = {name for part in self._parts.values() for name in part.names}
        self._buffers = {name: value for name, value in module.state_dict().items() if name not in known}
        self._hidden_size = int(whole.model.config.get_text_config().hidden_size)
        hidden_dtype = self._dtype if self._sharded else backbone.embed_tokens.weight.dtype
        received = self._drop_other_stages(module, backbone)
        if slices is None:
            module.to(self.device)
        else:
            module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))
        mine = backbone.layers[self._layers[self._stage_number] : self._layers[self._stage_number + 1]]
        if self._parallel.tp > 1:
            columns = {name: ColwiseParallel() for name in COLUMN_PARALLEL}
            rows = {name: RowwiseParallel() for name in ROW_PARALLEL}
            for layer in mine:
                parallelize_module(layer, self._mesh["tp"], columns | rows)
        casts = self._dtype != torch.float32
        autocast = self._dtype if casts and not self._sharded else None
        self._stage = StageModule(module, received, self._is_last, self._sequence_group, hidden_dtype, autocast)
        if self._sequence_group is not None:
            whole.model.config.get_text_config()._attn_implementation = SEQUENCE_PARALLEL
            whole.model.config._attn_implementation = SEQUENCE_PARALLEL
        if self._sharded:
            self._shard(mine, casts)
        unread = self._allocate() if slices is not None else set()
        for part in self._parts.values():
            if self._stage_number in part.stages:
                part.local = self._find_parameter(part)
        self._require_layout()
        for part in self._parts.values():
            if slices is not None and part.local is not None and part.local in unread:
                slices.read(part.names, self._local_part(part), local_tensor(part.local))
        size = sum(local_tensor(part.local).numel() for part in self._parts.values() if part.local is not None)
        most = torch.tensor(size, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        self._largest_shard = int(most)
        self.optimizer = make_optimizer([part.local for part in self._trained() if part.local is not None])

    def _list_parts(self, module: nn.Module, backbone: Any) -> dict[str, ShardedParameter]:
        prefix = next(name for name, each in module.named_modules() if each is backbone)
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        parts = {}
        for parameter, found in names.items():
            stages = sorted({self._stage_of(name.removeprefix(f"{prefix}.")) for name in found})
            part = ShardedParameter(found, tuple(parameter.shape), parameter.dtype, parameter.requires_grad, stages)
            if found[0].startswith(f"{prefix}.layers."):
                part.layer_name = found[0].removeprefix(f"{prefix}.layers.").split(".", 1)[1]
            parts[found[0]] = part
        return parts

    def _stage_of(self, name: str) -> int:
        """The pipeline stage of a parameter, by its name within the backbone."""
        if name.startswith("embed_tokens."):
            return 0
        if not name.startswith("layers."):
            return self._parallel.pp - 1
        layer = int(name.split(".")[1])
        return next(stage for stage, end in enumerate(self._layers[1:]) if layer < end)

    def _drop_other_stages(self, module: nn.Module, backbone: Any) -> ReceivedHiddenStates | None:
        """Remove the layers of other pipeline stages; transformers' forward runs the remaining ones."""
        if self._parallel.pp == 1:
            return None
        start, end = self._layers[self._stage_number : self._stage_number + 2]
        received = None
        for number in range(len(backbone.layers)):
            if not start <= number < end:
                backbone.layers[number] = SkippedLayer()
        if self._stage_number > 0:
            backbone.embed_tokens = received = ReceivedHiddenStates()
        if not self._is_last:
            backbone.norm = nn.Identity()
            inside = set(backbone.modules())
            for each in module.modules():
                if each not in inside:
                    each._parameters.update(dict.fromkeys(each._parameters))
        return received

    def _shard(self, layers: Any, casts: bool) -> None:
        """Apply FSDP2; with pipeline parallelism weights stay unsharded from a step's first micro-batch to its last."""
        precision = MixedPrecisionPolicy(
            param_dtype=self._dtype if casts else None,
            reduce_dtype=torch.float32 if casts else None,
            cast_forward_inputs=False,
        )
        mesh = self._mesh["data"]
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=self._parallel.pp == 1)
        fully_shard(self._stage, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
        for each in self._stage.modules():
            if isinstance(each, FSDPModule):  # gradients are added up, not averaged
                each.set_gradient_divide_factor(1.0)
                each.set_force_sum_reduction_for_comms(True)

    def _allocate(self) -> set[nn.Parameter]:
        """Allocate memory for this process's shard of every parameter on the meta device; returns these parameters."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for each in self._stage.modules():
            for name, parameter in each._parameters.items():
                if parameter is None or not parameter.is_meta:
                    continue
                if parameter not in made:  # tied parameters share one
                    empty = torch.empty_like(parameter, device=self.device)
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                each._parameters[name] = made[parameter]
        if self._sharded:
            self._stage._apply(lambda tensor: tensor)  # makes FSDP2 look up its parameters again
        return set(made.values())

    def _local_part(self, part: ShardedParameter) -> LocalPart:
        """Describe this process's shard of a parameter: the one that `_slice` cuts out of the unsharded tensor."""
        cut = None
        if self._parallel.tp > 1 and part.tensor_dim is not None:
            width = part.shape[part.tensor_dim] // self._parallel.tp
            cut = (part.tensor_dim, self._tensor_rank * width, (self._tensor_rank + 1) * width)
        tensor = GlobalTensor(part.names[0], "F32", part.shape)
        if not self._sharded:
            return part_of(tensor, cut)
        return part_of(tensor, cut, sharding="rows", shards=self._mesh["data"].size(), shard=self._data_rank)

    def _find_parameter(self, part: ShardedParameter) -> nn.Parameter:
        for name in part.names:
            owner, _, attribute = name.rpartition(".")
            with contextlib.suppress(AttributeError):
                found = getattr(self._stage.module.get_submodule(owner), attribute)
                if found is not None:
                    return found  # type: ignore[no-any-return]
        raise RuntimeError(f"the parallel layout is wrong: {part.names[0]} is missing in process {self.rank}")

    def _require_layout(self) -> None:
        """Verify how the parameters are really sharded: libraries fall back silently."""
        own = {id(part.local) for part in self._parts.values() if part.local is not None}
        strays = [name for name, value in self._stage.module.named_parameters() if id(value) not in own]
        if strays:
            raise RuntimeError(f"the parallel layout is wrong: {strays[0]} is in stage {self._stage_number}")
        for name, part in self._parts.items():
            if part.local is None:
                continue
            expected = tuple(self._slice(part, torch.empty(part.shape, device="meta")).shape)
            found = tuple(local_tensor(part.local).shape)
            divided = {(dim, number) for dim, number in sharded_dims(part.local)}
            wanted = {("data", 0)} if self._sharded else set()
            if self._parallel.tp > 1 and part.tensor_dim is not None:
                wanted.add(("tp", part.tensor_dim))
            if found != expected or divided != wanted:
                raise RuntimeError(
                    f"the parallel layout is wrong: process {self.rank} has {found} of {name}, divided by {divided}, "
                    f"instead of {expected}, divided by {wanted}"
                )

    def facts(self) -> dict[str, Any]:
        """The layout, and the largest number of parameters in one process."""
        return {
            "processes": self.world_size,
            "parallel": {
                "by": "torch",
                **self._parallel.model_dump(),
                "nodes": node_count(),
                "layers_by_stage": [end - start for start, end in itertools.pairwise(self._layers)],
                "parameters_per_process": self._largest_shard,
            },
        }

    # Forward and backward passes

    def forward(self, batch: Packed) -> Outputs:
        """The outputs of one micro-batch, broadcast by the last pipeline stage."""
        found: list[Outputs] = []

        def keep(outputs: Outputs, number: int) -> Tensor:
            found.append(outputs)
            return torch.zeros((), device=self.device)

        self._run_without_gradients([batch], keep)
        outputs = found[0] if self._is_last else {}
        if self._parallel.pp == 1:
            return outputs
        shapes = self._broadcast({name: (tuple(value.shape), value.dtype) for name, value in outputs.items()})
        for name, (shape, dtype) in shapes.items():
            value = outputs[name].contiguous() if self._is_last else torch.empty(shape, dtype=dtype, device=self.device)
            dist.broadcast(value, group=self._groups["pp"], group_src=self._parallel.pp - 1)
            outputs[name] = value
        return outputs

    def evaluate(self, batches: Sequence[Packed], share: Share) -> dict[str, Tensor]:
        """Sum the shares without gradients; as in `accumulate`, all processes must have equally many micro-batches."""
        metrics: dict[str, Tensor] = {}

        def measure(outputs: Outputs, number: int) -> Tensor:
            add_shares(metrics, share(outputs, number))
            return torch.zeros((), device=self.device)

        self._run_without_gradients(batches, measure)
        return self._broadcast_metrics(metrics)

    @torch.no_grad()
    def _run_without_gradients(self, batches: Sequence[Packed], finish: Callable[[Outputs, int], Tensor]) -> None:
        """Run micro-batches without gradients, and call `finish` with the outputs of each in the last stage."""
        chunk = 1 if self._parallel.pp == 1 else FORWARD_MICRO_BATCHES * self._parallel.pp
        for start in range(0, len(batches), chunk):
            self._stage.batches = batches[start : start + chunk]
            self._stage.start, self._stage.finish = start, finish
            if self._parallel.pp == 1:
                self._stage(number=0)
            else:
                self._run_schedule(len(self._stage.batches), trains=False)
        self._reshard()  # without a backward pass FSDP2 leaves some weights unsharded

    def accumulate(self, batches: Sequence[Packed], share: Share) -> dict[str, Tensor]:
        """Accumulate gradients; FSDP2 reduces them after each micro-batch (with pp the last), otherwise `clip` does."""
        metrics: dict[str, Tensor] = {}

        def finish(outputs: Outputs, number: int) -> Tensor:
            shares = share(outputs, number % len(batches))
            if number >= len(batches):  # fills the pipeline
                return shares["loss"] * 0
            add_shares(metrics, shares)
            return shares["loss"] / self._parallel.sp

        self._stage.batches, self._stage.start, self._stage.finish = batches, 0, finish
        self._gradients_reduced = False
        if self._parallel.pp == 1:
            for number in range(len(batches)):
                self._stage(number=number).backward()
        else:
            waiting = {part.local: part.local.grad for part in self._trained() if part.local is not None}
            for parameter in waiting:  # building a schedule makes torch clear the gradients
                parameter.grad = None
            self._run_schedule(max(len(batches), self._parallel.pp), trains=True)
            for parameter, gradient in waiting.items():
                if gradient is not None:
                    parameter.grad += gradient
        return self._broadcast_metrics(metrics)

    def _run_schedule(self, count: int, *, trains: bool) -> None:
        """Run a pipeline schedule over `count` micro-batches; it is rebuilt when their number or shape changes."""
        width = max(map(self._stage.token_count, self._stage.batches))
        self._width = max(self._width, width)
        self._stage.width = self._width
        if trains not in self._schedules or self._schedules[trains][0] != (count, self._width):
            self._schedules[trains] = ((count, self._width), self._schedule(count, trains))
        schedule = self._schedules[trains][1]
        numbers = torch.arange(count)
        target = {"target": numbers} if self._is_last and trains else {}
        try:
            schedule.step(number=numbers, return_outputs=False, **target)
        except RuntimeError as error:
            if isinstance(error.__cause__, UserError):  # torch has wrapped what `finish` raised
                raise error.__cause__ from None
            raise

    def _schedule(self, count: int, trains: bool) -> Any:
        shape = (self._width, self._hidden_size)
        hidden = torch.empty(shape, dtype=self._stage.dtype, device="meta", requires_grad=trains)
        stage = PipelineStage(
            self._stage,
            self._stage_number,
            self._parallel.pp,
            self.device,
            input_args=() if self._stage_number == 0 else hidden,
            output_args=torch.empty((), device="meta", requires_grad=trains) if self._is_last else hidden,
            group=self._groups["pp"],
        )
        if not trains:
            return ScheduleGPipe(stage, count)
        return Schedule1F1B(stage, count, loss_fn=lambda output, target: output, scale_grads=False)

    def _reshard(self) -> None:
        if self._sharded:
            for each in self._stage.modules():
                if isinstance(each, FSDPModule):
                    each.reshard()

    def _broadcast_metrics(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Broadcast the last stage's metrics."""
        if self._parallel.pp == 1:
            return metrics
        numbers = self._broadcast({name: value.tolist() for name, value in metrics.items()})
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}

    def _broadcast(self, value: Any) -> Any:
        """Broadcast an object from the last stage."""
        box = [value]
        dist.broadcast_object_list(box, group=self._groups["pp"], group_src=self._parallel.pp - 1, device=self.device)
        return box[0]

    # Optimizer step

    def _trained(self) -> Iterator[ShardedParameter]:
        yield from (part for part in self._parts.values() if part.trained)

    @torch.no_grad()
    def _reduce_gradients(self) -> None:
        """Sum the gradients over all processes that hold the same weights, once per step."""
        if self._gradients_reduced:
            return
        for part in self._trained():
            if part.local is None:
                continue
            if part.local.grad is None:
                part.local.grad = torch.zeros_like(part.local)
            gradient = local_tensor(part.local.grad)
            if not self._sharded and self._mesh["data"].size() > 1:
                dist.all_reduce(gradient, group=self._groups["data"])
            if self._parallel.tp > 1 and part.layer_name.startswith(HEAD_NORMS):
                dist.all_reduce(gradient, group=self._groups["tp"])
            if len(part.stages) > 1:
                dist.all_reduce(gradient, group=self._tied_head_group)
        self._gradients_reduced = True

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Clip the gradients to the global norm, in which every element of the model counts once."""
        self._reduce_gradients()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        gradients = []
        for part in self._trained():
            if part.local is None:
                continue
            gradient = local_tensor(part.local.grad)
            gradients.append(gradient)
            if self._counts_in_norm(part) and gradient.numel():
                total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        dist.all_reduce(total)
        norm = float(total.sqrt())
        if norm > max_norm:
            for gradient in gradients:
                gradient.mul_(max_norm / (norm + 1e-6))
        return norm

    def _counts_in_norm(self, part: ShardedParameter) -> bool:
        """Whether this process contributes its shard of a parameter to the global norm."""
        divided = {dim for dim, _ in sharded_dims(part.local)}
        return (
            self._stage_number == part.stages[0]
            and ("data" in divided or self._data_rank == 0)
            and ("tp" in divided or self._tensor_rank == 0)
        )

    def step(self) -> None:
        """Run one optimizer step."""
        self._reduce_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over the replicas: over all processes, divided by the processes per replica, which hold equal values."""
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return (total * self.replicas / self.world_size).to(values.dtype).cpu()

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.barrier()

    # Unsharded tensors

    def gather_weights(self) -> dict[str, Tensor]:
        """Gather all weights on the CPU of the main process; empty in the others."""
        weights: dict[str, Tensor] = dict(self._buffers) if self.is_main else {}
        for part in self._parts.values():
            beat()
            found = self._gather(part, part.local)
            if found is not None:
                weights.update(dict.fromkeys(part.names, found.cpu()))
        return {name: weights[name] for name in self._names} if self.is_main else {}

    def trained_shapes(self) -> Shapes:
        """Unsharded shapes by the first of a parameter's names."""
        return {name: part.shape for name, part in self._parts.items() if part.trained}

    def read(self, name: str, state_names: tuple[str, ...]) -> list[Tensor]:
        """Gather weights and moments in the main process; empty tensors in the others."""
        part = self._parts[name]
        tensors: list[Tensor] = []
        for number, state_name in enumerate(state_names):
            mine: Tensor | None = part.local
            if mine is not None and number:
                mine = self.optimizer.state[part.local].get(state_name, torch.zeros_like(mine))
            found = self._gather(part, mine)
            tensors.append(torch.empty(0) if found is None else found)
        return tensors

    @torch.no_grad()
    def set_weights(self, name: str, weights: Tensor) -> None:
        """Copy this process's slice of the unsharded weights."""
        part = self._parts[name]
        if part.local is not None:
            local_tensor(part.local).copy_(self._slice(part, weights))

    @torch.no_grad()
    def write(self, name: str, tensors: dict[str, Tensor], steps: int) -> None:
        """Copy this process's slices of the unsharded tensors; the first is the weights."""
        part = self._parts[name]
        if part.local is None:
            return
        (_, weights), *moments = tensors.items()
        self.set_weights(name, weights)
        for state_name, tensor in moments:
            state = self.optimizer.state[part.local]
            state[state_name] = torch.zeros_like(part.local)
            local_tensor(state[state_name]).copy_(self._slice(part, tensor))
            state["step"] = torch.tensor(float(steps), device=self.device)

    @torch.no_grad()
    def _gather(self, part: ShardedParameter, mine: Tensor | None) -> Tensor | None:
        """Gather the unsharded tensor in the main process, None in the others; `mine` is this process's shard."""
        stage = part.stages[0]
        found = None
        if self._stage_number == stage:
            found = self._gather_in_stage(part, mine)
        if stage:
            sender = self._rank_of(stage, 0, 0)
            if self.rank == sender:
                dist.send(found, 0)
            if self.is_main:
                found = torch.empty(part.shape, dtype=part.dtype, device=self.device)
                dist.recv(found, sender)
        return found if self.is_main else None

    def _gather_in_stage(self, part: ShardedParameter, mine: Tensor | None) -> Tensor:
        """Gather the unsharded tensor within a pipeline stage: the inverse of `_slice`."""
        found = local_tensor(mine).detach().contiguous()
        parts = self._parallel.tp if part.tensor_dim is not None else 1
        if self._sharded:
            length = part.shape[0] // (parts if part.tensor_dim == 0 else 1)
            count = self._mesh["data"].size()
            longest = -(-length // count)  # `chunk` makes all shards that long, except the last ones
            found = torch.cat([found, found.new_zeros(longest - len(found), *found.shape[1:])])
            found = torch.cat(all_gather(found, count, self._groups["data"]))[:length]
        if parts > 1:
            found = torch.cat(all_gather(found, parts, self._groups["tp"]), part.tensor_dim)
        return found

    def _slice(self, part: ShardedParameter, whole: Tensor) -> Tensor:
        """This process's shard of an unsharded tensor: split for tp first, then for fsdp2 along the first dimension."""
        if part.tensor_dim is not None:
            whole = whole.chunk(self._parallel.tp, part.tensor_dim)[self._tensor_rank]
        if self._sharded:
            pieces = whole.chunk(self._mesh["data"].size())
            whole = pieces[self._data_rank] if self._data_rank < len(pieces) else whole[:0]
        return whole
