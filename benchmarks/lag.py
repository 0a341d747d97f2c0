"""Measures how a lag affects learning: the toy task at several lags and seeds, with DPO and with decoupled PPO.

    .venv/bin/pipeline env run training benchmarks/lag.py --seeds 0 1 2 3 4 --iterations 4

All stages of the runs are executed in this process, in the order of their graphs, so that nothing is imported twice.
Artifacts that another run has published under the same key are reused, as in a sweep. If interrupted, the same command
continues. Prints a table, and as its last line one JSON object. The method is described in benchmarks/README.md.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, whose training.py is not the package

from contracts.artifacts import Artifact, is_published  # noqa: E402
from contracts.stage import key_parts, run_stage, stage_key  # noqa: E402
from contracts.versions import installed_versions  # noqa: E402
from pipelines.config.load import load_run_config  # noqa: E402
from pipelines.graph import Graph, Node, name_of  # noqa: E402
from pipelines.iteration import build_graph  # noqa: E402
from pipelines.run.sharing import link  # noqa: E402

RECIPES = {"dpo": "quickstart", "decoupled_ppo": "quickstart-ppo"}
SMALL = (
    "prompts.per_iteration=512",
    "generation.engine=transformers",
    "evaluation.k=2",
    'scorers={reward: {kind: reward_model}, gold: {kind: rule, function: "embedded.reviews:gold_score"}}',
)
"""Overrides that make the recipes smaller, and a gold scorer."""
T_VALUES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Half the width of a 95 % confidence interval of a mean, in standard errors, by the number of values (Student's t)."""
Curve = list[dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that are not published yet, print the results, and return the exit code."""
    options = parse(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    found: dict[tuple[str, int], list[Curve]] = {}
    made: dict[int, list[Graph]] = {}
    for algorithm in options.algorithms:
        for seed in options.seeds:
            for lag in options.lags:
                graph = graph_of(options.directory, algorithm, seed, lag, options.iterations)
                for node in graph.nodes.values():
                    publish(node, made.setdefault(seed, []))
                made[seed].append(graph)
                found.setdefault((algorithm, lag), []).append(curve(graph, options.iterations))
                print(f"{algorithm}, seed {seed}, lag {lag}: {gold(found[algorithm, lag][-1])}", flush=True)
    print(table(found, options.iterations))
    print(json.dumps({f"{algorithm} lag={lag}": curves for (algorithm, lag), curves in found.items()}))
    return 0


def graph_of(directory: Path, algorithm: str, seed: int, lag: int, iterations: int) -> Graph:
    """The graph of one run."""
    overrides = [
        f"directory={directory}",
        f"name={algorithm}-seed-{seed}-lag-{lag}",
        f"training.algorithm={algorithm}",
        f"seed={seed}",
        f"lag={lag}",
        *SMALL,
    ]
    return build_graph(load_run_config(RECIPES[algorithm], overrides), iterations)


def publish(node: Node, others: list[Graph]) -> None:
    """Publish a node's output unless it exists: reuse that of another run, or run the stage."""
    key = stage_key(key_parts(node.config, installed_versions()))
    if is_published(node.output, key):
        return
    for other in others:
        theirs = other.nodes.get(node.name)
        if theirs is not None and Artifact.open(theirs.output).manifest.key == key:
            node.output.parent.mkdir(parents=True, exist_ok=True)
            link(theirs.output, node.output)
            return
    run_stage(node.stage, node.config)


def curve(graph: Graph, iterations: int) -> Curve:
    """The metrics of every policy of a run, the initial one first."""
    names = [name_of(iteration, "evaluation") for iteration in range(iterations + 1)]
    return [Artifact.open(graph.nodes[name].output).manifest.facts["metrics"] for name in names]


def gold(curve: Curve) -> list[float]:
    """The gold rewards of a run's policies."""
    return [round(metrics["gold_reward_mean"], 3) for metrics in curve]


def table(found: dict[tuple[str, int], list[Curve]], iterations: int) -> str:
    """A table of mean gold rewards by iteration; the last one with its interval and its per-seed difference from
    lag 0."""
    numbers = [str(iteration) for iteration in range(1, iterations)]
    heads = ["algorithm", "lag", *numbers, f"{iterations}", "difference from lag 0", "KL"]
    lines = [heads, ["---"] * len(heads)]
    for (algorithm, lag), curves in found.items():
        last = [metrics[-1]["gold_reward_mean"] for metrics in curves]
        base = [metrics[-1]["gold_reward_mean"] for metrics in found.get((algorithm, 0), [])]
        against = [one - other for one, other in zip(last, base, strict=False)]
        means = [statistics.fmean(one[number]["gold_reward_mean"] for one in curves) for number in range(1, iterations)]
        kl = statistics.fmean(metrics[-1]["kl"] for metrics in curves)
        lines.append(
            [
                algorithm,
                str(lag),
                *(f"{mean:.3f}" for mean in means),
                with_interval(last, "{:.3f}"),
                with_interval(against, "{:+.3f}") if lag and against else "",
                f"{kl:.2f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_interval(values: list[float], form: str) -> str:
    """The mean of independent values, with half of its 95 % confidence interval if there are enough values."""
    mean = form.format(statistics.fmean(values))
    if len(values) not in T_VALUES:
        return mean
    half = T_VALUES[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {half:.3f}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--directory", type=Path, default=Path("runs/lag"), help="directory of the runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
