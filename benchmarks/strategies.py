"""Compares strategies by simulation, also in the settings of published comparisons: pictures and tables.

    .venv/bin/python benchmarks/strategies.py --help
    .venv/bin/python benchmarks/strategies.py pictures docs/images
    .venv/bin/python benchmarks/strategies.py real
    .venv/bin/python benchmarks/strategies.py app

All figures derive from data sheets (pipelines/planning/profiles); none was measured. Each strategy uses its best
division of the GPUs (a quarter, a half or three quarters for generation and scoring) and the best of LAYOUTS for its
trainings; what does not fit into memory is left out. `bare` leaves out the time that stages take to start, load and
publish, as in a system whose processes keep running and whose weights move in memory. async has a lag of 1.
"""

import argparse
import functools
import itertools
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import yaml  # noqa: E402
from shapes import write_model, write_prompts  # noqa: E402

from contracts.errors import UserError  # noqa: E402
from pipelines.config.cluster import MachinesSection  # noqa: E402
from pipelines.config.load import load_run_config  # noqa: E402
from pipelines.graph import Node  # noqa: E402
from pipelines.iteration import build_graph  # noqa: E402
from pipelines.planning.cluster import Cluster, cluster_of_machines  # noqa: E402
from pipelines.planning.placement import place  # noqa: E402
from pipelines.planning.prediction import Prediction  # noqa: E402
from pipelines.planning.profiles.datasheets import data_sheet  # noqa: E402
from pipelines.planning.profiles.predict import ProfilePredictor  # noqa: E402
from pipelines.planning.scheduling import start_order, streams  # noqa: E402
from pipelines.planning.simulation import ScheduleConditions, Simulation, simulate  # noqa: E402

STRATEGIES = ("flattening", "interleaving", "separation", "async")
COLOURS = {"flattening": "#555555", "interleaving": "#4878a8", "separation": "#6aa56a", "async": "#c8743c"}
ITERATIONS = 6
LAYOUTS: tuple[dict[str, Any], ...] = ({"zero": "fsdp2"}, {"zero": 2}, {"tp": 8, "zero": "fsdp2"})
"""Layouts of a training; dp is the number of devices divided by tp."""


@dataclass(frozen=True)
class Setting:
    """The settings of a PPO run."""

    actor: str
    """The shape of the policy and the reference model."""
    critic: str
    """The shape of the critic and the reward model."""
    gpus: int
    prompts: int
    prompt_tokens: int
    answer_tokens: int
    gpu: str = "H100-SXM"
    tensor_parallel: int = 1
    minibatches: int = 1
    """Optimizer steps per iteration."""
    layouts: tuple[dict[str, Any], ...] = field(default=LAYOUTS, hash=False)
    """The layouts of its trainings, of which each strategy uses the best."""


def config_of(folder: Path, setting: Setting, strategy: str, share: float, layout: dict[str, Any]) -> Path:
    """Write the config of a setting and return its path.

    Args:
        share: the share of the GPUs for generation and scoring, if the strategy divides them.
    """
    first = int(setting.gpus * share)
    pools = {"generation": first, "training": setting.gpus - first} if strategy in ("separation", "async") else {}
    length = setting.prompt_tokens + setting.answer_tokens
    prompts = write_prompts(folder / "prompts.jsonl", setting.prompts, setting.prompt_tokens)
    algorithm = "decoupled_ppo" if strategy == "async" else "ppo"
    trained = {
        "global_batch": setting.prompts // setting.minibatches, "max_length": length, "dtype": "bfloat16",
        "gradient_checkpointing": True, "parallel": layout,
    }  # fmt: skip
    written = {
        "name": "replay", "directory": str(folder / "runs"), "policy": str(write_model(folder, setting.actor)),
        "prompts": {
            "train": {"source": str(prompts)}, "heldout": {"source": str(prompts)}, "per_iteration": setting.prompts,
        },
        "scorers": {"reward": {"kind": "reward_model", "model": str(write_model(folder, setting.critic))}},
        "generation": {
            "k": 1, "max_new_tokens": setting.answer_tokens, "dtype": "bfloat16", "shard_size": 16,
            "tensor_parallel": setting.tensor_parallel,
        },
        "training": {"algorithm": algorithm, **trained}, "critic": {"start": "reward_model", **trained},
        "placement": {"strategy": strategy, "pools": pools}, "lag": int(strategy == "async"),
    }  # fmt: skip
    path = folder / "replay.yaml"
    path.write_text(yaml.safe_dump(written))
    return path


@dataclass(frozen=True)
class Planned:
    """The placed stages of a run, without the evaluation of policies, which the published comparisons do not have
    either."""

    order: list[Node]
    cluster: Cluster
    predictions: dict[str, Prediction]
    conditions: ScheduleConditions


@functools.cache
def planned(setting: Setting, strategy: str, share: float, number: int) -> Planned:
    """Plan a run with the layout of this number; `bare` makes no difference to it.

    Raises:
        UserError: the run cannot be placed like this, or a stage cannot be predicted.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = config_of(Path(folder), setting, strategy, share, setting.layouts[number])
        config = load_run_config(written, [])
        machines = MachinesSection(machines=max(1, setting.gpus // 8), gpus=min(8, setting.gpus), gpu=setting.gpu)
        cluster = cluster_of_machines(config, machines)
        graph = place(build_graph(config, ITERATIONS), cluster)
        order = [
            node for node in start_order(graph, config) if "heldout" not in node.name and node.role != "evaluation"
        ]
        predictor = ProfilePredictor([], setting.gpu, warm=False)
        found = {node.name: predictor.predict(node, graph) for node in order}
        known = {name: one for name, one in found.items() if one is not None}
        return Planned(order, cluster, known, ScheduleConditions(streams(graph, config)))


def run(setting: Setting, strategy: str, share: float, number: int, *, bare: bool) -> Simulation:
    """Simulate a setting.

    Raises:
        UserError: the run cannot be planned like this, or it does not fit into memory.
    """
    plan = planned(setting, strategy, share, number)
    known = plan.predictions
    if bare:
        known = {name: replace(one, start=0.0, load=0.0, handoff=0.0) for name, one in known.items()}
    found = simulate(plan.order, plan.cluster, known, plan.conditions)
    if (too_large := found.exceeding(data_sheet(setting.gpu).memory)) is not None:
        raise UserError(f"{too_large[0]} takes {too_large[1]} bytes of a device, which has less.")
    return found


def best(setting: Setting, strategy: str, *, bare: bool) -> float | str:
    """The seconds of an iteration with a strategy's best division and layout, or the reason why none is possible."""
    shares = (0.25, 0.5, 0.75) if strategy in ("separation", "async") else (1.0,)
    found, why = [], ""
    for share, number in itertools.product(shares, range(len(setting.layouts))):
        try:
            simulation = run(setting, strategy, share, number, bare=bare)
            found.append(sum(simulation.iterations[2:]) / (ITERATIONS - 2))
        except UserError as error:
            why = str(error)
    return min(found, default=why)


def compare(setting: Setting, *, bare: bool, strategies: tuple[str, ...] = STRATEGIES) -> tuple[dict[str, float], str]:
    """The seconds of an iteration by strategy, and the reason why the last impossible one is left out."""
    found = {name: best(setting, name, bare=bare) for name in strategies}
    why = [one for one in found.values() if isinstance(one, str)]
    return {name: one for name, one in found.items() if not isinstance(one, str)}, why[-1] if why else ""


def shown(times: dict[str, float], why: str) -> str:
    """The strategies with their times, the fastest first, as text."""
    if not times:
        return why
    return ", ".join(f"{name} {times[name]:.1f} s" for name in sorted(times, key=times.__getitem__))


# Pictures


def by_gpus(*, bare: bool) -> dict[int, dict[str, float]]:
    """Compare strategies by the number of H100: PPO of an 8B model with 1024 prompts per iteration."""
    base = Setting("8B", "8B", 8, 1024, 256, 1024, minibatches=8)
    return {gpus: compare(replace(base, gpus=gpus), bare=bare)[0] for gpus in (8, 16, 32, 64, 128)}


def by_length(*, bare: bool) -> dict[int, dict[str, float]]:
    """Compare strategies by the length of answers, on 32 H100."""
    base = Setting("8B", "8B", 32, 1024, 256, 1024, minibatches=8)
    return {
        tokens: compare(replace(base, answer_tokens=tokens), bare=bare)[0] for tokens in (128, 512, 1024, 2048, 4096)
    }


def chart(title: str, axis: str, found: dict[int, dict[str, float]]) -> str:
    """An SVG chart of the time per iteration relative to flattening."""
    width, height, left, top = 640, 360, 60, 40
    points = [times for times in found.values() if "flattening" in times]
    lines = {
        name: [(number, times[name] / times["flattening"]) for number, times in enumerate(points) if name in times]
        for name in STRATEGIES
    }
    highest = max(1.2, *(share for line in lines.values() for _, share in line)) * 1.05
    step = (width - left - 150) / max(1, len(found) - 1)
    room = height - top - 50

    def at(number: int, share: float) -> tuple[float, float]:
        return left + number * step, top + room * (1 - share / highest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for tick in range(int(highest / 0.25) + 1):
        x, y = at(0, tick * 0.25)
        parts.append(f'<line x1="{x}" y1="{y:.1f}" x2="{width - 150}" y2="{y:.1f}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{tick * 0.25:g}</text>')
    for number, label in enumerate(found):
        x, _ = at(number, 0)
        parts.append(f'<text x="{x:.1f}" y="{top + room + 18}" text-anchor="middle" fill="#555">{label}</text>')
    parts.append(f'<text x="{left}" y="{height - 8}" fill="#555">{escape(axis)}</text>')
    for row, (name, line) in enumerate(lines.items()):
        drawn = " ".join("{:.1f},{:.1f}".format(*at(number, share)) for number, share in line)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        y = top + 16 + 20 * row
        parts.append(f'<line x1="{width - 140}" y1="{y}" x2="{width - 116}" y2="{y}" stroke="{COLOURS[name]}"/>')
        parts.append(f'<text x="{width - 110}" y="{y + 4}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


PICTURES = {
    "strategies-by-gpus": (by_gpus, "PPO of 8B, stages start anew: time against flattening", "H100"),
    "strategies-by-gpus-bare": (by_gpus, "PPO of 8B, computing alone: time against flattening", "H100"),
    "strategies-by-length": (by_length, "PPO of 8B on 32 H100, computing alone", "tokens of an answer"),
}


def pictures(folder: Path) -> Iterator[str]:
    """Draw all pictures, and yield a line for each point."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (find, title, axis) in PICTURES.items():
        found = find(bare=name != "strategies-by-gpus")
        (folder / f"{name}.svg").write_text(chart(title, axis, found))
        for point, times in found.items():
            yield f"{name} {point:5}: {shown(times, '')}"


# Published comparisons

REAL = {"7B": 8, "13B": 16, "34B": 32, "70B": 64}
"""ReaL's weak scaling (arXiv 2406.14088; get_n_gpus in the plot scripts of openpsi-project/ReaLHF): the number of H100
by model size, twice as many if critic and reward model have the same size; prompts of 128 tokens, 2^17 tokens per
iteration. Four optimizer steps per iteration are assumed."""
REAL_ANSWERS = (128, 896)
TENSOR = {"7B": 1, "13B": 1, "34B": 2, "70B": 4}


def real(layouts: tuple[dict[str, Any], ...]) -> Iterator[str]:
    """Simulate flattening, interleaving and separation in ReaL's settings."""
    for (size, gpus), both, answer in itertools.product(REAL.items(), (False, True), REAL_ANSWERS):
        setting = Setting(
            size, size if both else "7B", gpus * (1 + both), 2**17 // (128 + answer), 128, answer,
            tensor_parallel=TENSOR[size], minibatches=4, layouts=layouts,
        )  # fmt: skip
        times = shown(*compare(setting, bare=True, strategies=STRATEGIES[:3]))
        yield f"{size:>3} + {setting.critic:>3}, {setting.gpus:3} GPUs, answers of {answer:3}: {times}"


def app() -> Iterator[str]:
    """Simulate the strategies of APP (arXiv 2312.11819) on A100, with and without the time that stages take to
    start."""
    for size, bare in itertools.product(("7B", "13B", "34B"), (False, True)):
        setting = Setting(size, "7B", 32, 1024, 256, 256, gpu="A100-80", tensor_parallel=TENSOR[size], minibatches=8)
        yield f"{size:>3} {'bare' if bare else '':<4}: {shown(*compare(setting, bare=bare))}"


def main() -> int:
    """Print or draw the requested comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pictures", "real", "app"))
    parser.add_argument("folder", type=Path, nargs="?", default=Path("pictures"), help="folder for pictures")
    parser.add_argument("--fsdp2-alone", action="store_true", help="use no other layout for trainings, in `real`")
    options = parser.parse_args()
    layouts = LAYOUTS[:1] if options.fsdp2_alone else LAYOUTS
    found = {"pictures": lambda: pictures(options.folder), "real": lambda: real(layouts), "app": app}[options.what]()
    for line in found:
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
