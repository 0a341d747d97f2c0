"""Placement: which devices a stage uses: all of this machine's, one stage after another, or what it asks of Slurm."""

import os

from annotation.config import ScoreConfig
from contracts.config import StageConfig
from contracts.errors import UserError
from generation.config import GenerationConfig
from pipelines.config.executor import HERE, ExecutorSection, StageSection, kind_of, replica_gpus
from pipelines.machine import gpu_count
from training.config import TrainingConfig


def place_stage(name: str, config: StageConfig, executor: ExecutorSection) -> StageConfig:
    """The same stage spread over the devices of the place where it runs.

    Raises:
        UserError: it cannot be spread over what is asked of Slurm.
    """
    entry = executor.entry(name, config)
    if entry.kind not in HERE:
        return _place_on_slurm(name, config, entry)
    if isinstance(config, TrainingConfig) and config.parallel.nodes > 1:
        raise UserError(
            f"stage {name}: parallel.nodes is {config.parallel.nodes}, but it runs on this machine alone. Set "
            "executor=slurm, or parallel.nodes=1."
        )
    return place(config, gpu_count())


def _place_on_slurm(name: str, config: StageConfig, entry: StageSection) -> StageConfig:
    gpus = 0 if os.environ.get("RATCHET_VARIANT") == "cpu" else entry.gpus or 0
    if isinstance(config, TrainingConfig):
        return _place_over_nodes(name, config, entry.nodes, gpus)
    if not isinstance(config, GenerationConfig | ScoreConfig) or kind_of(config) == "light":
        return config
    if config.replicas > 1:
        raise UserError(
            f"stage {name}: replicas is {config.replicas}, but on Slurm the tasks of the job array are the replicas. "
            f"Take it out, and set executor.stages.{kind_of(config)}.tasks={config.replicas}."
        )
    if 0 < gpus < replica_gpus(config):
        raise UserError(
            f"stage {name}: every task asks Slurm for {gpus} GPU, but its model takes {replica_gpus(config)} "
            f"(tensor_parallel). Set executor.stages.{kind_of(config)}.gpus={replica_gpus(config)}."
        )
    return config.model_copy(update={"replicas": 1})


def _place_over_nodes(name: str, config: TrainingConfig, nodes: int | None, gpus: int) -> TrainingConfig:
    """A training over nodes of Slurm with `gpus` each; without any, as many processes as the config says."""
    parallel = config.parallel
    if nodes is not None and "nodes" in parallel.model_fields_set and nodes != parallel.nodes:
        raise UserError(
            f"stage {name}: parallel.nodes is {parallel.nodes}, but the executor's `nodes` is {nodes}. Set one of them."
        )
    nodes = nodes or parallel.nodes
    placed = _place_training(config, nodes * gpus)
    processes = placed.parallel.processes
    if gpus and processes > nodes * gpus:
        raise UserError(
            f"stage {name}: parallel ({parallel}) has {processes} processes, but the job has {nodes * gpus} GPUs "
            f"(nodes={nodes}, gpus={gpus}). Ask for more in executor.stages.training, or set parallel to fewer."
        )
    if processes % nodes:
        raise UserError(
            f"stage {name}: nodes={nodes} does not divide the {processes} processes of parallel ({placed.parallel}). "
            "Every node runs equally many: set executor.stages.training.nodes to a divisor, or parallel.dp to a "
            "multiple."
        )
    update = {"nodes": nodes, "dp": placed.parallel.dp}
    return config.model_copy(update={"parallel": parallel.model_copy(update=update)})


def place(config: StageConfig, gpus: int) -> StageConfig:
    """The same stage spread over `gpus` devices, as far as the user has not said how many processes it has."""
    if isinstance(config, TrainingConfig):
        return _place_training(config, gpus)
    fields: dict[str, int] = {}
    if isinstance(config, GenerationConfig) and not config.servers:
        fields = {"replicas": gpus // config.tensor_parallel}
    elif isinstance(config, ScoreConfig) and config.kind != "rule":
        fields = {"replicas": gpus}
    update = {name: count for name, count in fields.items() if count > 1 and name not in config.model_fields_set}
    return config.model_copy(update=update)


def _place_training(config: TrainingConfig, gpus: int) -> TrainingConfig:
    """Data parallelism over what tp, pp and sp leave."""
    parallel = config.parallel
    dp = gpus // (parallel.tp * parallel.pp * parallel.sp)
    if dp <= 1 or "dp" in parallel.model_fields_set:
        return config
    return config.model_copy(update={"parallel": parallel.model_copy(update={"dp": dp})})
