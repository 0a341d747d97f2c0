"""`pipeline plan simulate`: simulates a run's plan on given machines, with predictions from past runs."""

from collections.abc import Sequence

from contracts.errors import UserError
from pipelines.config.cluster import MachinesSection
from pipelines.config.run import RunConfig
from pipelines.execution.profiling import predictor_for, threads_of
from pipelines.graph import Graph
from pipelines.insight.driver_time import local_driver_costs
from pipelines.insight.simulation_view import SimulationView, view_simulation
from pipelines.planning.cluster import (
    Cluster,
    cluster_of_machines,
    config_on_machines,
    configured_cluster,
)
from pipelines.planning.draws import draw_runs
from pipelines.planning.entries import check_entries
from pipelines.planning.memory import Device, device_of, estimate_memory, format_bytes, require_memory
from pipelines.planning.preflight import require_possible
from pipelines.planning.profiles.datasheets import sheet_of_machines
from pipelines.planning.profiles.predict import ProfilePredictor
from pipelines.planning.scheduling import start_order, streams
from pipelines.planning.simulation import DriverCosts, ScheduleConditions, contention, predict_all, simulate, with_queue
from pipelines.run.directory import RunDirectory
from pipelines.run.plan import Plan

DRAWS = 200


def simulate_plan(
    plan: Plan, machines: MachinesSection | None, runs: Sequence[RunDirectory], *, draws: int = DRAWS, seed: int = 0
) -> SimulationView:
    """Simulate a run.

    Args:
        plan: the run's plan.
        machines: the machines to simulate; None: this machine.
        runs: runs to learn from, in addition to the stored profiles and the run itself.
        draws: how many runs to draw at random; none are drawn if no stage's duration can be predicted.
        seed: seed of the draws.

    Raises:
        UserError: there is no data sheet for the GPUs; or the run is not possible on them: an input does not exist, a
            layout does not fit its model or takes more GPUs than there are, or a stage needs more memory.
    """
    config, cluster = plan.config, configured_cluster(plan.config)
    device = device_of(config)
    sheet = None
    if machines is not None:
        config, cluster = config_on_machines(config), cluster_of_machines(config, machines)
        sheet = sheet_of_machines(machines)
        device = Device(f"{machines.total} {sheet.name}", sheet.memory, machines.total)
    graph = plan.graph
    check_entries(graph, config)
    require_possible(graph, cluster, without_weights=True)
    needs, _ = estimate_memory(graph, on_gpu=device.gpus > 0)
    require_memory(graph, config, device, needs)
    predictor = predictor_for(config, runs=runs, device=sheet.name if sheet is not None else "")
    if sheet is not None:
        predictor.sheet = sheet
    require_known_gpus(config, cluster, predictor)
    driver = local_driver_costs(plan.config, runs)
    order = start_order(graph, config)
    conditions = conditions_of(graph, config, cluster, driver)
    predictions = predict_all(graph, predictor)
    if machines is not None:
        predictions = with_queue(predictions, order, machines.queue.seconds)
    found = simulate(order, cluster, predictions, conditions, bound=True)
    if (breaking := found.exceeding(device.bytes)) is not None:
        name, needed = breaking
        raise UserError(
            f"stage {name}, and what runs at the same time, need {format_bytes(needed)} of {device.name}, which has "
            f"{format_bytes(device.bytes)}. {graph.nodes[name].stage.memory_fix}"
        )
    drawn = draw_runs(found, graph, config.executor, machines, count=draws, seed=seed) if found.predictions else None
    return view_simulation(
        found, graph, config, machines=machines, room=device.bytes, driver=driver, draws=drawn, seed=seed
    )


def require_known_gpus(config: RunConfig, cluster: Cluster, predictor: ProfilePredictor) -> None:
    """Raise UserError where a run asks a scheduler for GPUs of an unknown type."""
    executor = config.executor
    if executor.is_remote and executor.requests_gpus and cluster.scheduler_has_gpus and not predictor.sheet.is_gpu:
        raise UserError(
            f"stages ask {executor.kind} for GPUs, and no job has been seen yet that had one, so their type is not "
            "known. Run one iteration, or `pipeline profile CONFIG`, or name the type in a cluster file (--cluster)."
        )


def conditions_of(graph: Graph, config: RunConfig, cluster: Cluster, driver: DriverCosts | None) -> ScheduleConditions:
    """The conditions other than order, devices and durations that decide when stages start and end."""
    demands, room = contention(graph.nodes.values(), cluster, lambda node: threads_of(node, config))
    return ScheduleConditions(streams(graph, config), driver or DriverCosts(), demands, room)
