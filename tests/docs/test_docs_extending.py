"""The examples of docs/extending.md, each put where the page says and run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PACKAGES = ("annotation", "contracts", "embedded", "generation", "pipelines", "training")
DRIVE = """
import sys
from pathlib import Path

from contracts.stages.prompts import IMPORT_PROMPTS
from pipelines.config.load import load_run_config
from pipelines.execution.driver import Driver
from pipelines.execution.executors.base import Site
from pipelines.graph import Graph
from pipelines.insight.listeners import listeners_of
from pipelines.job import ENTRY
from pipelines.planning.cluster import cluster_of
from pipelines.planning.placement import place
from pipelines.run.directory import RunDirectory

path = Path(sys.argv[1])
config = load_run_config(path, sys.argv[2:])
run = RunDirectory(config.run_directory)
run.claim(config, path, 0)
graph = Graph(run.path)
graph.add(IMPORT_PROMPTS, "prompts", {"source": path.parent / "prompts.jsonl"})
graph = place(graph, cluster_of(config))
Driver(Site(run, graph, config, ENTRY), listeners_of(run, graph)).drive()
"""
SAMPLED = """
import sys
from pathlib import Path

from contracts.ledger import Ledger
from contracts.publication import Publication
from contracts.records import ROLLOUTS, Completion, Message, Rollout

publication = Publication(Path(sys.argv[1]), ROLLOUTS, "generation", "0" * 64)
publication.begin()
for number, ends in enumerate((["stop", "length"], ["length", "length"], ["stop", "stop"])):
    answers = tuple(Completion(sample, (5, 2), "good", end, (), None, None) for sample, end in enumerate(ends))
    row = Rollout(f"{number:016x}", (Message("user", "so?"),), (1, 4), answers, "weights", 1, "processed")
    ledger = Ledger("prompts")
    ledger.keep()
    publication.write_rows(f"shard-{number:05d}.jsonl", [row], ledger)
publication.publish(key_parts={}, inputs={}, input_paths={}, unit="prompts", weights=None, versions={}, seconds={},
                    facts={"bos_token_id": 1})
"""
PLANNED = """
import sys
from pathlib import Path

from pipelines.config.load import load_run_config
from pipelines.planning.estimates import published_bytes
from pipelines.planning.placement import placed_graph

graph = placed_graph(load_run_config(Path(sys.argv[1]), []), 1)
for name, node in graph.nodes.items():
    print(name, node.environment, node.workload, *node.needs, published_bytes(node, graph))
"""
QSUB = """#!/usr/bin/env bash
echo "$@" >> "$PBS_HOME/asked"
setsid bash -c "$(cat)" > /dev/null 2>&1 < /dev/null &
echo $!
"""
QSTAT = """#!/usr/bin/env bash
kill -0 "$1" 2> /dev/null
"""
QDEL = """#!/usr/bin/env bash
kill -- "-$1"
"""


@pytest.fixture
def example(tmp_path: Path, root: Path) -> Path:
    """A copy of Ratchet, and beside it a config with prompts."""
    for package in PACKAGES:
        shutil.copytree(root / package, tmp_path / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    rows = [json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(3)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    source = {"source": str(tmp_path / "prompts.jsonl")}
    config = {
        "name": "example",
        "directory": str(tmp_path / "runs"),
        "policy": str(tmp_path),
        "prompts": {"train": source, "heldout": source},
        "scorers": {"reward": {"kind": "rule", "function": "embedded.reviews:gold_score"}},
        "environments": {"annotation": {"python": sys.executable}},
    }
    (tmp_path / "example.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def put(folder: Path, root: Path, path: str) -> None:
    """Write the module that docs/extending.md shows for a path: the block whose first line is about it."""
    text = (root / "docs/extending.md").read_text()
    name = Path(path).stem
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (code,) = [block for block in blocks if re.match(f'"""(Keeps )?{name}\\b', block, re.IGNORECASE)]
    assert path in text
    (folder / "code" / path).write_text(code)


def drive(folder: Path, *overrides: str, **variables: str) -> None:
    python(folder, "-c", DRIVE, str(folder / "example.yaml"), *overrides, **variables)


def python(folder: Path, *arguments: str, **variables: str) -> str:
    """Run Python with the copy of Ratchet, and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "code"), **variables}
    command = [sys.executable, *arguments]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_listener_is_one_file(example: Path, root: Path) -> None:
    put(example, root, "pipelines/insight/listeners/slowest.py")
    drive(example)
    assert re.fullmatch(r" +[0-9.]+ s  prompts\n", (example / "runs/example/slowest.txt").read_text())


def test_an_executor_is_one_file(example: Path, root: Path) -> None:
    put(example, root, "pipelines/execution/executors/pbs.py")
    programs = example / "programs"
    programs.mkdir()
    for name, text in (("qsub", QSUB), ("qstat", QSTAT), ("qdel", QDEL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    drive(example, "executor=pbs", "executor.stages.light.cpus=2", PATH=path, PBS_HOME=str(programs))
    assert (example / "runs/example/prompts/manifest.json").is_file()
    assert (programs / "asked").read_text() == "-N prompts -l select=1:ncpus=2 -V\n"
    refusing = example / "refusing"
    refusing.mkdir()
    (refusing / "qsub").write_text("#!/bin/sh\necho 'Unknown queue' >&2; exit 170\n")
    (refusing / "qsub").chmod(0o755)
    for said, path in (("qsub is not on PATH", "/nowhere"), ("170: Unknown queue", f"{refusing}:/bin")):
        with pytest.raises(AssertionError, match=f"UserError: .*{said}"):
            drive(example, "executor=pbs", "directory=other", PATH=path)


def test_a_stage_is_one_file_and_a_line_in_the_recipe(example: Path, root: Path) -> None:
    put(example, root, "annotation/stages/filter.py")
    recipe = example / "code/pipelines/iteration.py"
    (line,) = re.findall(r"^ +rollouts = self.graph.add\(FILTER.*\n", (root / "docs/extending.md").read_text(), re.M)
    text = re.sub(r'( +rollouts = self.sample\("generation".*\n)', lambda found: found[1] + line, recipe.read_text())
    recipe.write_text(text.replace("from annotation.stages.gate", "from annotation.stages.filter import FILTER\n"
                                   "from annotation.stages.gate", 1))  # fmt: skip
    lines = python(example, "-c", PLANNED, str(example / "example.yaml")).splitlines()
    planned = {name: facts for name, *facts in map(str.split, lines)}
    assert planned["iteration-001/filter"] == ["annotation", "light", "iteration-001/generation", "None"]
    assert planned["iteration-001/reward"][2] == "iteration-001/filter"
    assert {"iteration-001/filter", "iteration-001/reward"} <= {*planned["iteration-001/pairs"]}
    assert int(planned["iteration-001/pairs"][-1]) > 0  # estimated by what the filter passes on
    python(example, "-c", SAMPLED, str(example / "rollouts"))
    told = python(example, "-m", "annotation", "filter", "rollouts=rollouts", "output=kept")
    assert "3 prompts in = 2 kept + 1 cut_off" in told
    assert "reuse kept" in python(example, "-m", "annotation", "filter", "rollouts=rollouts", "output=kept")


def test_a_kind_of_scorer_is_one_file(example: Path, root: Path) -> None:
    put(example, root, "annotation/scorers/brevity.py")
    override = "import sys; from pipelines.config.load import load_run_config; from pathlib import Path\n"
    override += "print(load_run_config(Path(sys.argv[1]), sys.argv[2:]).scorers['short'].kind)"
    config, short = str(example / "example.yaml"), "scorers.short={kind: brevity, tokens: 4}"
    assert python(example, "-c", override, config, short) == "brevity\n"
    python(example, "-c", SAMPLED, str(example / "rollouts"))
    told = python(
        example, "-m", "annotation", "score", "rollouts=rollouts", "kind=brevity", "tokens=4", "output=scores",
        "missing_eos_penalty=1",
    )  # fmt: skip
    assert "6 samples in = 6 kept" in told
    rows = [json.loads(line) for line in (example / "scores/shard-00000.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [-0.5, -1.5]
    assert "kind=brevity" in python(example, "-m", "annotation", "score", "--help")
