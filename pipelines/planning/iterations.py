"""Checks the number of iterations of a run, and warns about config keys that have no effect with so few."""

from contracts.errors import UserError
from pipelines.config.run import RunConfig
from pipelines.graph import Graph

MAX_ITERATIONS = 10_000
"""Maximum number of iterations; a larger one is surely a typing error, since an iteration takes minutes."""
MAX_ACCUMULATED = 1_000
"""Maximum number of iterations if each reads data of all earlier ones."""


def require_iterations(config: RunConfig, requested: int | None) -> int:
    """The number of iterations that a command asks for: `--iters`, or the config's.

    Raises:
        UserError: the number is negative, or larger than a run may have.
    """
    wanted, name = (config.iterations, "iterations") if requested is None else (requested, "--iters")
    if not 0 <= wanted <= MAX_ITERATIONS:
        raise UserError(f"{name} is {wanted}; it must be from 0 to {MAX_ITERATIONS}.")
    curriculum = config.prompts.curriculum
    for key, is_set, what in (
        ("accumulate=true", config.accumulate, "pairs"),
        ("replay", config.replay is not None and config.replay.iterations is None, "pairs"),
        ("prompts.curriculum", curriculum is not None and curriculum.iterations is None, "scores"),
    ):
        if is_set and wanted > MAX_ACCUMULATED:
            fix = "set accumulate=false" if config.accumulate else f"set {key}.iterations"
            raise UserError(
                f"{name} is {wanted} with {key}, with which every iteration reads the {what} of all earlier ones; then "
                f"it must be from 0 to {MAX_ACCUMULATED}. Lower it, or {fix}."
            )
    return wanted


def lag_beyond_run(graph: Graph) -> str | None:
    """A warning if the lag makes all iterations of a graph sample from the same policy, else None."""
    sampling = [node for node in graph.nodes.values() if node.role == "generation"]
    if graph.lag == 0 or len(sampling) < 2 or len({node.path("policy") for node in sampling}) > 1:
        return None
    return (
        f"lag={graph.lag} with {len(sampling)} iterations: all of them sample from the initial policy, so that none "
        "learns from the answers of a policy that another has trained. Lower lag, or run more iterations."
    )


def curriculum_beyond_run(config: RunConfig, iterations: int) -> str | None:
    """A warning if no iteration of the run has scores for the curriculum, else None."""
    if config.prompts.curriculum is None or not 0 < iterations <= config.lag + 1:
        return None
    return (
        f"prompts.curriculum with {iterations} iteration{'s' if iterations > 1 else ''} (lag={config.lag}): none has "
        "the scores of an earlier one, so that all take their prompts in turn. Run more iterations, or leave it out."
    )
