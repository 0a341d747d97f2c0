"""How many iterations a run can have, and what of its config so many of them leave without effect."""

from contracts.errors import UserError
from pipelines.config.run import RunConfig
from pipelines.graph import Graph

MOST_ITERATIONS = 10_000
"""More are surely a typing error: an iteration takes minutes."""
MOST_ACCUMULATED = 1_000
"""The same where each iteration reads the pairs of all before it."""


def require_iterations(config: RunConfig, asked: int | None) -> int:
    """How many iterations a command wants: `--iters`, or what the config says.

    Raises:
        UserError: the number is negative, or beyond all that a run can have.
    """
    wanted, name = (config.iterations, "iterations") if asked is None else (asked, "--iters")
    if not 0 <= wanted <= MOST_ITERATIONS:
        raise UserError(f"{name} is {wanted}; it must be from 0 to {MOST_ITERATIONS}.")
    curriculum = config.prompts.curriculum
    for key, is_set, what in (
        ("accumulate=true", config.accumulate, "pairs"),
        ("replay", config.replay is not None and config.replay.iterations is None, "pairs"),
        ("prompts.curriculum", curriculum is not None and curriculum.iterations is None, "scores"),
    ):
        if is_set and wanted > MOST_ACCUMULATED:
            fix = "set accumulate=false" if config.accumulate else f"set {key}.iterations"
            raise UserError(
                f"{name} is {wanted} with {key}, by which every iteration reads the {what} of all before it; with that "
                f"it must be from 0 to {MOST_ACCUMULATED}. Lower it, or {fix}."
            )
    return wanted


def lag_beyond_run(graph: Graph) -> str | None:
    """What is wrong with a lag by which all iterations of a graph sample from the same policy; None if it is not so."""
    sampling = [node for node in graph.nodes.values() if node.role == "generation"]
    if graph.lag == 0 or len(sampling) < 2 or len({node.path("policy") for node in sampling}) > 1:
        return None
    return (
        f"lag={graph.lag} with {len(sampling)} iterations: all of them sample from the initial policy, so that none "
        "learns from the answers of a policy that another has trained. Lower lag, or run more iterations."
    )


def curriculum_beyond_run(config: RunConfig, iterations: int) -> str | None:
    """What is wrong with a curriculum that no iteration of a run has scores for; None if it is not so."""
    if config.prompts.curriculum is None or not 0 < iterations <= config.lag + 1:
        return None
    return (
        f"prompts.curriculum with {iterations} iteration{'s' if iterations > 1 else ''} (lag={config.lag}): none has "
        "the scores of an earlier one, so that all take their prompts in turn. Run more iterations, or leave it out."
    )
