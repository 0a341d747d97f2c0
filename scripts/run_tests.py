"""Runs the linters, the type checker and the tests, each test in the environment of the code that it tests.

scripts/test.sh calls this. Without paths, six lanes run in parallel, each through one check after another, the longest
first. That is four more than the cores that they are meant for, since many tests mostly wait, above all those of
clusters. The output of a check is printed as a whole when it ends. With paths, checks run one after the other, and
their output is printed immediately.

Hundreds of these tests depend on the timing of several processes, which the load of other lanes changes. If very few
fail, they run once more, alone. The summary names those that pass then: each points to a fault in the test or in the
tested code that should be investigated, but it does not block an unrelated change.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from zlib import crc32

from pipelines.environments.locked import interpreter

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
DURATIONS = TESTS / "durations.json"
LOCK = ROOT / "configs/environments/test.txt"
ENVIRONMENTS = {
    "contracts": "driver", "pipelines": "driver", "environments": "driver", "docs": "driver",
    "reallocation": "driver",
    "embedded": "training", "training": "training", "benchmarks": "training",
    "annotation": "annotation", "generation": "generation", "tracking": "tracking",
}  # fmt: skip
"""The environment of each folder's tests."""
FAST = "not slow and not cluster and not chaos"
FLAGS = ("--fast", "--store-durations")
LANES = 6
FEW = 3
"""The most failures that may be caused by the load of other lanes: up to this many run again alone."""
ON_CLUSTERS = re.compile(r"_(chain|chain_ends|slurm|fake_slurm|dev_slurm|one_job)\.py$")
GROUP_SECONDS = 400.0
FAST_GROUP_SECONDS = 150.0
CLUSTER_GROUP_SECONDS = 700.0
"""About how long a group of tests takes if a folder is divided."""
UNKNOWN_SECONDS = 60.0
"""The assumed duration of a folder without stored durations."""
SHORTEST = 0.5
"""Tests that take less time are stored as one sum per file."""
PYTEST = """
import os, sys
sys.path.append(sys.argv.pop(1))
import pytest
code = pytest.main(sys.argv[2:])
sys.stdout.flush()
os._exit(0 if code == pytest.ExitCode.NO_TESTS_COLLECTED and sys.argv[1] == "some" else code)
"""
"""A folder without any tests fails, unless tests are selected (-k, --fast). os._exit is used because a library's thread
that a test left waiting, such as one of torch's stores, would abort a normal exit."""


@dataclass
class Check:
    """A linter or a group of tests, which runs as one process."""

    name: str
    command: list[str]
    seconds: float
    """The expected duration; after the run, the actual one."""
    report: Path | None = None
    """The file in which pytest writes the outcome of each test."""
    output: str = ""
    code: int = 0

    def run(self, environment: dict[str, str], *, live: bool) -> None:
        """Run the process to its end. With `live`, its output goes straight to the terminal; otherwise it is kept."""
        begin = time.monotonic()
        where = None if live else subprocess.PIPE
        result = subprocess.run(
            self.command, cwd=ROOT, env=environment, stdout=where, stderr=where and subprocess.STDOUT, check=False
        )
        self.output = (result.stdout or b"").decode(errors="replace")
        self.code = result.returncode
        self.seconds = time.monotonic() - begin

    def cases(self) -> Iterable[ElementTree.Element]:
        """Yield every test from pytest's report."""
        if self.report is not None and self.report.exists():
            yield from ElementTree.parse(self.report).getroot().iter("testcase")


def main() -> int:
    """Run the checks. Returns the exit code: 0 if everything passed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore SIGINT in background commands
    options = sys.argv[1:]
    chosen = []
    while options and (options[0] in FLAGS or options[0].startswith("tests/")):
        chosen.append(options.pop(0))
    paths = [word for word in chosen if word not in FLAGS]
    if "--fast" in chosen:
        options += ["-m", FAST]
    for path in paths:
        if path.split("/")[1] not in ENVIRONMENTS:
            print(f"error: {path} is in none of tests/{', tests/'.join(ENVIRONMENTS)}", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as reports:
        checks = [] if paths else [*linters(), *unassigned()]
        checks += test_checks(paths, options, Path(reports))
        run_all(checks, lanes=1 if paths else LANES, shared=reports)
        again = [] if paths else failed_tests(checks, Path(reports))
        with tempfile.TemporaryDirectory() as fresh:  # rebuild what tests share, because it may have been the fault
            run_all([check for _, check in again], lanes=1, shared=fresh)
        if "--store-durations" in chosen:
            store_durations(checks)
        return summary(checks, dict(again))


def linters() -> list[Check]:
    """The linters and the type checker."""
    tools = ROOT / ".venv/bin"
    return [
        Check("ruff check", [f"{tools}/ruff", "check", "."], 1),
        Check("ruff format", [f"{tools}/ruff", "format", "--check", "."], 1),
        Check("lint-imports", [f"{tools}/lint-imports", "--no-logo"], 1),
        Check("mypy", [f"{tools}/mypy"], 60),
    ]


def unassigned() -> list[Check]:
    """A failing check for each test file whose folder has no environment."""
    files = [path.relative_to(ROOT) for path in sorted(TESTS.rglob("test_*.py"))]
    strays = [path for path in files if path.parts[1] not in ENVIRONMENTS]
    fail = "import sys; sys.exit(f'error: scripts/run_tests.py has no environment for {sys.argv[1]}')"
    return [Check(str(path), [sys.executable, "-c", fail, str(path)], 0) for path in strays]


def test_checks(paths: list[str], options: list[str], reports: Path) -> list[Check]:
    """A check for each group of tests."""
    stored = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
    fast = FAST in options
    seconds_of = {
        file: sum(seconds for test, seconds in tests.items() if not (fast and "(" in test))
        for file, tests in stored.items()
    }
    checks = []
    for (name, environment), group in groups(paths, seconds_of, fast=fast).items():
        known = [seconds for file, seconds in seconds_of.items() if file.startswith(tuple(group))]
        report = reports / f"{name}.xml"
        choice = "some" if options else "all"
        python = sys.executable if environment == "driver" else str(interpreter(environment))
        command = [python, "-c", PYTEST, str(test_tools()), choice, f"--junit-xml={report}"]
        seconds = sum(known) if known else UNKNOWN_SECONDS
        checks.append(Check(f"tests/{name} ({environment})", [*command, *group, *options], seconds, report))
    return checks


def groups(paths: list[str], seconds_of: Mapping[str, float], *, fast: bool) -> dict[tuple[str, str], list[str]]:
    """Group tests by process: the paths of each group by (name, environment).

    A folder whose tests take long is divided into groups of about GROUP_SECONDS. Cluster tests are in groups of their
    own, because each group starts a cluster. With --fast, which starts no cluster, the folders of the training
    environment are one group, because importing its libraries takes longer than the tests of the small folders.
    """
    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for folder, environment in ENVIRONMENTS.items():
        if paths:
            if chosen := [path for path in paths if path.split("/")[1] == folder]:
                found[folder, environment] = chosen
            continue
        files = sorted(path.relative_to(ROOT).as_posix() for path in (TESTS / folder).glob("test_*.py"))
        clusters = [file for file in files if folder == "pipelines" and not fast and ON_CLUSTERS.search(file)]
        name = "training" if fast and environment == "training" else folder
        for part, group in divided(
            name,
            [file for file in files if file not in clusters],
            seconds_of,
            FAST_GROUP_SECONDS if fast else GROUP_SECONDS,
        ):
            found[part, environment] += group
        for part, group in divided(f"{name}-on-clusters", clusters, seconds_of, CLUSTER_GROUP_SECONDS):
            found[part, environment] += group
    return dict(found)


def divided(
    name: str, files: list[str], seconds_of: Mapping[str, float], seconds: float
) -> Iterator[tuple[str, list[str]]]:
    """Divide files into named groups that take about `seconds` each, the longest file first."""
    count = max(1, round(sum(seconds_of.get(file, 0.0) for file in files) / seconds))
    parts: list[tuple[float, list[str]]] = [(0.0, [])] * count
    for file in sorted(files, key=lambda file: -seconds_of.get(file, 0.0)):
        shortest = min(range(count), key=lambda number: parts[number][0])
        total, group = parts[shortest]
        parts[shortest] = (total + seconds_of.get(file, 0.0), [*group, file])
    for number, (_, group) in enumerate(parts, 1):
        if group:
            yield f"{name}-{number}" if count > 1 else name, group


def test_tools() -> Path:
    """A folder with pytest for the stages' environments. It is appended to sys.path, so the environments stay as they
    are."""
    home = Path(os.environ.get("RATCHET_HOME") or Path.home() / ".cache/ratchet")
    folder = home / f"test-tools-{crc32(LOCK.read_bytes()):08x}"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", part, "-r", LOCK], check=True)
        part.rename(folder)
    return folder


def run_all(checks: list[Check], lanes: int, shared: str) -> None:
    """Run all checks, `lanes` at a time.

    Args:
        shared: a directory for files that several checks need but only one creates.
    """
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "SHARED_BY_TESTS": shared,
    }  # fmt: skip
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes start: compile our modules once
    waiting = sorted(checks, key=lambda check: check.seconds) if lanes > 1 else checks[::-1]
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not waiting:
                    return
                check = waiting.pop()
                print(f"== {check.name}" + (" ..." if lanes > 1 else ""), flush=True)
            check.run(environment, live=lanes == 1)
            with lock:
                if lanes > 1:
                    print(f"== {check.name}: exit code {check.code} after {check.seconds:.0f} s\n{check.output}")

    workers = [threading.Thread(target=work) for _ in range(lanes)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        waiting.clear()  # Ctrl-C has reached the running checks; start no others
        for worker in workers:
            worker.join()
        raise


def failed_tests(checks: list[Check], reports: Path) -> list[tuple[str, Check]]:
    """The names of failed checks, each with a check that runs only its failed tests.

    Empty if more than `FEW` tests failed, or if a process ended without a report, since it may not have run all of its
    tests.
    """
    failed = [check for check in checks if check.code]
    names = {check.name: [node_id(case) for case in check.cases() if has_failed(case)] for check in failed}
    if not all(names.values()) or sum(map(len, names.values())) > FEW:
        return []
    found = []
    for check in failed:
        report = reports / f"again-{len(found)}.xml"
        python, code, (tools, choice, *_) = check.command[0], check.command[1:3], check.command[3:]
        command = [python, *code, tools, choice, f"--junit-xml={report}", *names[check.name]]
        found.append((check.name, Check(f"{check.name}, failed tests again", command, 0, report)))
    return found


def has_failed(case: ElementTree.Element) -> bool:
    """Whether a test or one of its fixtures failed."""
    return any(child.tag in ("failure", "error") for child in case)


def node_id(case: ElementTree.Element) -> str:
    """The node id by which pytest selects a test."""
    parts = case.get("classname", "").split(".")
    length = next(count for count in range(len(parts), 0, -1) if file_of(parts[:count]).exists())
    path = file_of(parts[:length]).relative_to(ROOT).as_posix()
    return "::".join([path, *parts[length:], case.get("name", "")])


def store_durations(checks: list[Check]) -> None:
    """Write how long each test function took. Variants of one tier are added up, and so are a file's short tests."""
    found: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for check in checks:
        for case in check.cases():
            parts = [*case.get("classname", "").split("."), case.get("name", "")]
            length = next(count for count in range(len(parts), 0, -1) if file_of(parts[:count]).exists())
            path = file_of(parts[:length]).relative_to(ROOT).as_posix()
            tier = next((entry.get("value") for entry in case.iter("property") if entry.get("name") == "tier"), None)
            name = parts[length].partition("[")[0] + (f" ({tier})" if tier else "")
            found[path][name] += float(case.get("time", 0))
    stored = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
    for path, tests in found.items():
        long = {name: round(seconds, 1) for name, seconds in tests.items() if seconds >= SHORTEST}
        others = round(sum(seconds for seconds in tests.values() if seconds < SHORTEST), 1)
        stored[path] = {**dict(sorted(long.items(), key=lambda item: -item[1])), "others": others}
    stored = {path: tests for path, tests in sorted(stored.items()) if (ROOT / path).exists()}
    DURATIONS.write_text(json.dumps(stored, indent=1) + "\n")


def file_of(parts: list[str]) -> Path:
    """The path of a module."""
    return ROOT.joinpath(*parts).with_suffix(".py")


def summary(checks: list[Check], again: Mapping[str, Check]) -> int:
    """Print failed checks and the numbers of passed, failed and skipped tests. Returns the exit code.

    A check that failed without a failed test counts as one failed test.

    Args:
        checks: all checks.
        again: by the name of a failed check, the check that ran its failed tests again.
    """
    passed = failed = skipped = 0
    for check in checks:
        bad = 0
        retried = again.get(check.name)
        for case in check.cases():
            kinds = {child.tag for child in case}
            bad += has_failed(case)
            skipped += "skipped" in kinds
            passed += not kinds & {"failure", "error", "skipped"}
            if has_failed(case) and retried is not None and not retried.code:
                print(f"FAILED IN PARALLEL, passed alone: {node_id(case)}")
        if retried is not None and not retried.code:
            passed, bad = passed + bad, 0
        elif check.code:
            print(f"FAILED: {check.name}")
            bad = max(1, bad)
        failed += bad
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
