"""Training engine on accelerate: a single process, DDP, or DeepSpeed ZeRO."""

import contextlib
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    InitProcessGroupKwargs,
    check_cuda_p2p_ib_support,
)
from torch import Tensor, nn

from contracts.attempt import beat
from contracts.errors import UserError
from modeling.loading import Shapes
from modeling.packing import Packed
from training.config import TrainingConfig
from training.engines import zero
from training.engines.base import COLLECTIVE_TIMEOUT, Outputs, Share, TrainingEngine, add_shares, node_count
from training.slices import WeightSlices


class AcceleratedEngine(TrainingEngine):
    """Data parallelism: every process has the whole model, or its ZeRO shard, and computes its own micro-batches."""

    def __init__(self, config: TrainingConfig, dtype: torch.dtype) -> None:
        """Set up accelerate, and verify that it runs the configured layout.

        accelerate falls back silently: to one process (distributed_type MULTI_CPU, or --cpu --num_processes N), and
        from DeepSpeed to plain data parallelism (`Accelerator(cpu=True)`). The results are right in either case, so
        only its own state shows what really runs.

        Raises:
            UserError: the number of processes or the ZeRO stage differs from the config's.
        """
        self.accelerator = _create_accelerator(config, dtype)
        self.zero = _zero_stage(self.accelerator)
        self.device = self.accelerator.device
        self.rank = self.accelerator.process_index
        self.world_size = self.replicas = self.accelerator.num_processes
        self.replica = self.rank
        self.master_copies = self.zero > 0
        self.needs_step_before_write = self.zero > 0

    def facts(self) -> dict[str, Any]:
        """The layout as accelerate reports it."""
        offloaded = _offloaded(self.accelerator)
        layout = {"dp": self.replicas, "zero": self.zero, "offload": offloaded, "nodes": node_count()}
        return {
            "processes": self.world_size,
            "parallel": {"by": f"accelerate: {self.accelerator.distributed_type.value}", **layout},
        }

    def prepare(
        self,
        module: nn.Module,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        slices: WeightSlices | None = None,
    ) -> None:
        """Wrap module and optimizer with accelerate."""
        assert slices is None  # for the native engine only
        self.module = module
        self.parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.prepared: Any
        self.prepared, self.optimizer = self.accelerator.prepare(module, make_optimizer([*self.parameters.values()]))

    @torch.no_grad()
    def forward(self, batch: Packed) -> Outputs:
        """The outputs of the wrapped module."""
        outputs: Outputs = self.prepared(batch)
        return outputs

    def accumulate(self, batches: Sequence[Packed], share: Share) -> dict[str, Tensor]:
        """Accumulate gradients; they are reduced in the backward pass of the last micro-batch."""
        metrics: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            beat()
            with self._gradient_sync(last=number == len(batches) - 1):
                shares = share(self.prepared(batch), number)
                # DDP and ZeRO average the gradients of the processes; the loss is a sum.
                self.accelerator.backward(shares["loss"] * self.replicas)
            add_shares(metrics, shares)
        return metrics

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Packed], share: Share) -> dict[str, Tensor]:
        """Sum the shares over forward passes without gradients."""
        metrics: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            beat()
            add_shares(metrics, share(self.prepared(batch), number))
        return metrics

    def clip(self, max_norm: float) -> float:
        """Clip the gradients; under DeepSpeed `backward` has done that already, and only the norm is read."""
        return float(self.accelerator.clip_grad_norm_(self.prepared.parameters(), max_norm))

    def step(self) -> None:
        """Step the optimizer; under DeepSpeed `accumulate` has done that already, and this does nothing."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def all_reduce(self, values: Tensor) -> Tensor:
        """All-reduce (sum) a tensor."""
        total: Tensor = self.accelerator.reduce(values.to(self.device), "sum")
        return total.cpu()

    def barrier(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def gather_weights(self) -> dict[str, Tensor]:
        """The state dict; under ZeRO-3 gathered from all processes, on rank 0 only.

        accelerate's own function is used under DeepSpeed only: it imports DeepSpeed (2 s) wherever it is installed.
        """
        weights: dict[str, Tensor] = (
            self.accelerator.get_state_dict(self.prepared) if self.zero else self.module.state_dict()
        )
        return weights

    def trained_shapes(self) -> Shapes:
        """Unsharded shapes by the module's parameter names."""
        return {name: zero.whole_shape(parameter) for name, parameter in self.parameters.items()}

    def read(self, name: str, state_names: tuple[str, ...]) -> list[Tensor]:
        """Unsharded weights and moments; under ZeRO gathered from all processes."""
        parameter = self.parameters[name]
        if self.zero:
            return [
                zero.get_weights(parameter),
                *(zero.get_moment(parameter, state_name) for state_name in state_names[1:]),
            ]
        # A parameter that has had no gradient yet has no moments.
        state = self.optimizer.state[parameter]
        return [parameter, *(state.get(state_name, torch.zeros_like(parameter)) for state_name in state_names[1:])]

    def set_weights(self, name: str, weights: Tensor) -> None:
        """Replace DeepSpeed's master weights, if it keeps them; otherwise the module's weights."""
        parameter = self.parameters[name]
        if self.zero:
            zero.set_weights(parameter, weights)
            return
        with torch.no_grad():
            parameter.copy_(weights)

    def write(self, name: str, tensors: dict[str, Tensor], steps: int) -> None:
        """Replace weights and moments; under DeepSpeed a step must have created the moments."""
        parameter = self.parameters[name]
        weights, *moments = tensors.items()
        if self.zero:
            zero.set_weights(parameter, weights[1])
            for moment, value in moments:
                zero.set_moment(parameter, moment, value)
            zero.set_steps(self.optimizer, steps)
            return
        self.set_weights(name, weights[1])
        for moment, value in moments:
            self.optimizer.state[parameter][moment] = value.to(parameter.device)
            self.optimizer.state[parameter]["step"] = torch.tensor(float(steps), device=parameter.device)

    def _gradient_sync(self, last: bool) -> Any:
        """Context that reduces gradients (and, under DeepSpeed, clips and steps) for the last micro-batch only."""
        self.accelerator.sync_gradients = last
        return contextlib.nullcontext() if last or self.zero else self.accelerator.no_sync(self.prepared)


def _create_accelerator(config: TrainingConfig, dtype: torch.dtype) -> Accelerator:
    stage, on_cpu = config.parallel.deepspeed_stage, not torch.cuda.is_available()
    plugin = None
    if stage:
        if on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        _disable_compiled_collective()
        _import_muon_uncompiled()
        plugin = DeepSpeedPlugin(
            zero_stage=stage,
            gradient_accumulation_steps=1,  # the training loop accumulates
            gradient_clipping=config.max_grad_norm,
            offload_optimizer_device="cpu" if "optimizer" in config.parallel.offload else "none",
            offload_param_device="cpu" if "param" in config.parallel.offload else "none",
            zero3_init_flag=stage == 3,
            zero3_save_16bit_model=stage == 3,  # the published checkpoint is gathered from all processes
        )
    if not on_cpu and not check_cuda_p2p_ib_support():  # some consumer GPUs, for which accelerate's launcher does this
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            os.environ.setdefault(name, "1")
    accelerator = Accelerator(
        mixed_precision="bf16" if dtype == torch.bfloat16 else "no",
        # With cpu=True accelerate ignores DeepSpeed; without it and without a named backend, it assumes one process.
        cpu=on_cpu and not stage,
        deepspeed_plugin=plugin,
        kwargs_handlers=[
            InitProcessGroupKwargs(backend="gloo" if on_cpu and stage else None, timeout=COLLECTIVE_TIMEOUT)
        ],
    )
    found, offloaded = _zero_stage(accelerator), _offloaded(accelerator)
    if found != config.parallel.deepspeed_stage or set(offloaded) != set(config.parallel.offload):
        raise UserError(
            f"parallel ({config.parallel}) is declared, but ZeRO stage {found} is running (0: no DeepSpeed) with "
            f"offload={offloaded}. Start the stage without a launcher of your own."
        )
    if accelerator.num_processes != config.parallel.processes:
        raise UserError(
            f"{accelerator.num_processes} process(es) were started, but parallel ({config.parallel}) declares "
            f"{config.parallel.processes}. Start the stage without a launcher of your own."
        )
    if found:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = 1  # only used for DeepSpeed's throughput log
        # DeepSpeed's own CPU optimizer supports only Adam, and takes minutes to compile.
        settings["zero_force_ds_cpu_optimizer"] = config.optimizer == "adamw" and not on_cpu
    return accelerator


def _zero_stage(accelerator: Accelerator) -> int:
    """ZeRO stage; 0 without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return int(accelerator.state.deepspeed_plugin.zero_stage)


def _offloaded(accelerator: Accelerator) -> list[str]:
    """What DeepSpeed offloads to CPU memory: "optimizer", "param"."""
    if not _zero_stage(accelerator):
        return []
    settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    names = ("optimizer", "param")
    return [name for name in names if (settings.get(f"offload_{name}") or {}).get("device", "none") != "none"]


def _disable_compiled_collective() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective for CPUs (minutes, g++); gloo gives the same bits."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimizer, which every ZeRO training imports, without loading torch's compiler for it.

    Loading the compiler takes each process two seconds; no training here uses Muon. Versions of DeepSpeed that have it
    elsewhere import it on their own.
    """
    from deepspeed.runtime import compiler

    original = compiler.compile
    compiler.compile = lambda *given, **options: lambda function: function
    try:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = original
