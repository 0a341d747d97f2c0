"""Compares data strategies (docs/data.md) or pair strategies (docs/pairs.md): DPO on the toy task at several seeds.

    .venv/bin/pipeline env run training benchmarks/data.py --compare data --seeds 0 1 2 3 4
    .venv/bin/pipeline env run training benchmarks/data.py --compare pairs --seeds 0 1 2 3 4

All stages of the runs are executed in this process and reused where runs do not differ, as in benchmarks/lag.py. If
interrupted, the same command continues. Prints a table, and as its last line one JSON object. The method is described
in benchmarks/README.md.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, whose training.py is not the package

from benchmarks.lag import Curve, curve, gold, publish, with_interval  # noqa: E402
from contracts.artifacts import Artifact  # noqa: E402
from contracts.records import Pair  # noqa: E402
from pipelines.config.load import load_run_config  # noqa: E402
from pipelines.graph import Graph, name_of  # noqa: E402
from pipelines.iteration import build_graph  # noqa: E402

SMALL = (
    "prompts.per_iteration=256",
    "generation.engine=transformers",
    "evaluation.k=2",
    'scorers={reward: {kind: reward_model}, gold: {kind: rule, function: "embedded.reviews:gold_score"}}',
)
"""Overrides that make the recipe smaller, and a gold scorer."""
OFFLINE = "setup/reward-model/pairs"
"""The node whose pairs serve as offline pairs: answers of the initial policy, compared by the gold scorer."""
DATA: dict[str, tuple[str, ...]] = {
    "own pairs": (),
    "the same prompts": ("prompts.train.limit=256",),
    "accumulate": ("accumulate=true",),
    "replay": ("replay={decay: 0.5}",),
    "offline": ("offline={source: OFFLINE, share: 0.25}",),
    "mixture": (
        "prompts.train=null",
        "prompts.mixture.main={source: 'world:train.jsonl', weight: 3}",
        "prompts.mixture.more={source: 'world:preference.jsonl'}",
    ),
    "curriculum": ("prompts.curriculum={measure: rank, low: 0.1, high: 0.6}",),
    "dynamic sampling": ("prompts.dynamic_sampling={rounds: 2, margin: 5}",),
}
PAIRS: dict[str, tuple[str, ...]] = {
    "max_min": (),
    "max_min, twice the epochs": ("training.epochs=4",),
    "max_random": ("pairs.strategy=max_random",),
    "max_max": ("pairs.strategy=max_max",),
    "top_k_bottom_k": ("pairs={strategy: top_k_bottom_k, settings: {top: 2, bottom: 2}, per_prompt: 2}",),
    "margin": ("pairs.margin=5",),
    "length_matched": ("pairs={strategy: length_matched, per_prompt: 1}",),
    "uncertainty": ("pairs={strategy: uncertainty, per_prompt: 1}",),
    "west of 8": ("generation.k=8",),
}
COMPARED = {"data": DATA, "pairs": PAIRS}
"""The strategies of each comparison with their overrides; the first one is the baseline."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that are not published yet, print the results, and return the exit code."""
    options = parse(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    found: dict[str, list[Curve]] = {}
    base = next(iter(COMPARED[options.compare]))
    for seed in options.seeds:
        made: list[Graph] = []
        offline = options.directory / f"offline-seed-{seed}.jsonl"
        for strategy in options.strategies:
            if strategy == "offline":
                write_offline(options, seed, offline, made)
            graph = graph_of(options, strategy, seed, offline)
            for node in graph.nodes.values():
                publish(node, made)
            made.append(graph)
            found.setdefault(strategy, []).append(curve(graph, options.iterations))
            found[strategy][-1][-1]["pairs"] = pairs_of(graph, options.iterations)
            print(f"{strategy}, seed {seed}: {gold(found[strategy][-1])}", flush=True)
    print(table(found, options.iterations, base))
    print(json.dumps(found))
    return 0


def graph_of(options: argparse.Namespace, strategy: str, seed: int, offline: Path) -> Graph:
    """The graph of one run."""
    own = [text.replace("OFFLINE", str(offline)) for text in COMPARED[options.compare][strategy]]
    name = strategy.replace(",", "").replace(" ", "-")
    overrides = [f"directory={options.directory}", f"name={name}-seed-{seed}", f"seed={seed}", *SMALL, *own]
    return build_graph(load_run_config("quickstart", overrides), options.iterations)


def write_offline(options: argparse.Namespace, seed: int, file: Path, made: list[Graph]) -> None:
    """Write the reward model's pairs as texts to a file, as users have them."""
    graph = graph_of(options, "own pairs", seed, file)
    for node in graph.nodes.values():
        if node.iteration is None:
            publish(node, made)
    pairs = Artifact.open(graph.nodes[OFFLINE].output).rows(Pair)
    rows = ({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pairs_of(graph: Graph, iteration: int) -> int:
    """The number of pairs that an iteration trains on."""
    config = graph.nodes[name_of(iteration, "training")].config.model_dump()
    return sum(Artifact.open(path).manifest.ledger.kept for path in config["pairs"])


def table(found: dict[str, list[Curve]], iterations: int, base: str) -> str:
    """A table of mean gold rewards by iteration; the last one with its interval and its difference from `base`.

    The pairs are those of the last iteration, the KL is that of the last policy.
    """
    heads = ["", *map(str, range(1, iterations + 1)), f"difference from {base}", "pairs", "KL"]
    lines = [heads, ["---"] * len(heads)]
    for strategy, curves in found.items():
        last = [metrics[-1]["gold_reward_mean"] for metrics in curves]
        others = [metrics[-1]["gold_reward_mean"] for metrics in found.get(base, [])]
        against = [one - other for one, other in zip(last, others, strict=False)]
        means = [statistics.fmean(one[number]["gold_reward_mean"] for one in curves) for number in range(1, iterations)]
        pairs, kl = (statistics.fmean(metrics[-1][name] for metrics in curves) for name in ("pairs", "kl"))
        cells = [strategy, *(f"{mean:.3f}" for mean in means), with_interval(last, "{:.3f}")]
        cells.append(with_interval(against, "{:+.3f}") if against and strategy != base else "")
        lines.append([*cells, f"{pairs:.0f}", f"{kl:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--compare", choices=COMPARED, default="data")
    parser.add_argument("--strategies", nargs="+", help="the strategies to compare; by default all")
    parser.add_argument("--directory", type=Path, default=Path("runs/data"), help="directory of the runs")
    options = parser.parse_args(arguments)
    known = COMPARED[options.compare]
    options.strategies = options.strategies or list(known)
    if unknown := sorted(set(options.strategies) - set(known)):
        parser.error(f"--strategies: there is no {unknown[0]!r} among those of {options.compare}: {', '.join(known)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
