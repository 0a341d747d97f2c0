"""The linters, the types and the tests, each test in the environment of what it tests; scripts/test.sh calls this.

Without a choice of paths, four lanes work side by side, each through one check after another, the longest first: two
more than the cores that they are made for, since many tests wait, those of clusters most of the time. What a check has
printed comes out as a whole when it ends. With paths, one runs after the other, and prints as it goes.

Hundreds of these tests are of processes that meet at some instant, and lanes that compute for others decide when. Where
very few have failed, they run once more, alone. Those that pass then are named in the summary: each is a fault to look
into, of the test or of what it tests, but does not stop somebody else's change.
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
from collections.abc import Iterable, Mapping
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
LANES = 4
FEW = 3
"""Failures that may be those of the lanes: so many are tried again alone, more are not."""
ON_CLUSTERS = re.compile(r"_(chain|chain_ends|slurm|fake_slurm|dev_slurm|one_job)\.py$")
UNKNOWN_SECONDS = 60.0
"""Of a folder whose duration is not stored."""
SHORTEST = 0.5
"""Tests that take less are stored as a sum for each file."""
PYTEST = """
import os, sys
sys.path.append(sys.argv.pop(1))
import pytest
code = pytest.main(sys.argv[2:])
sys.stdout.flush()
os._exit(0 if code == pytest.ExitCode.NO_TESTS_COLLECTED and sys.argv[1] == "some" else code)
"""
"""With a choice of tests (-k, --fast), a folder may have none of them; without, it must have some. A library's thread
that a test has left waiting, such as one of torch's stores, would abort Python's ordinary end."""


@dataclass
class Check:
    """One process of the whole."""

    name: str
    command: list[str]
    seconds: float
    """About how long it takes."""
    report: Path | None = None
    """Where pytest writes what became of each test."""
    output: str = ""
    code: int = 0

    def run(self, environment: dict[str, str], *, live: bool) -> None:
        """Run it to its end; its output is kept unless it goes straight to the terminal."""
        begin = time.monotonic()
        where = None if live else subprocess.PIPE
        result = subprocess.run(
            self.command, cwd=ROOT, env=environment, stdout=where, stderr=where and subprocess.STDOUT, check=False
        )
        self.output = (result.stdout or b"").decode(errors="replace")
        self.code = result.returncode
        self.seconds = time.monotonic() - begin

    def cases(self) -> Iterable[ElementTree.Element]:
        """Every test, as pytest reports it."""
        if self.report is not None and self.report.exists():
            yield from ElementTree.parse(self.report).getroot().iter("testcase")


def main() -> int:
    """Returns the exit code: 0 when everything passed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
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
        checks = [] if paths else [*linters(), *homeless()]
        checks += test_checks(paths, options, Path(reports))
        run_all(checks, lanes=1 if paths else LANES, shared=reports)
        again = [] if paths else failed_tests(checks, Path(reports))
        with tempfile.TemporaryDirectory() as fresh:  # what tests share is made anew: it may be what was wrong
            run_all([check for _, check in again], lanes=1, shared=fresh)
        if "--store-durations" in chosen:
            store_durations(checks)
        return summary(checks, dict(again))


def linters() -> list[Check]:
    """What needs no test."""
    tools = ROOT / ".venv/bin"
    return [
        Check("ruff check", [f"{tools}/ruff", "check", "."], 1),
        Check("ruff format", [f"{tools}/ruff", "format", "--check", "."], 1),
        Check("lint-imports", [f"{tools}/lint-imports", "--no-logo"], 1),
        Check("mypy", [f"{tools}/mypy"], 60),
    ]


def homeless() -> list[Check]:
    """A check that fails, for each file of tests that no environment runs."""
    files = [path.relative_to(ROOT) for path in sorted(TESTS.rglob("test_*.py"))]
    strays = [path for path in files if path.parts[1] not in ENVIRONMENTS]
    say = "import sys; sys.exit(f'error: scripts/run_tests.py has no environment for {sys.argv[1]}')"
    return [Check(str(path), [sys.executable, "-c", say, str(path)], 0) for path in strays]


def test_checks(paths: list[str], options: list[str], reports: Path) -> list[Check]:
    """One for each group that has something to run."""
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
    """What one process runs: by a name and an environment, the tests' paths.

    Most often it is a folder. By far the largest is divided: its tests of clusters share one group, the others are
    spread over three. In the fast loop, which has no real cluster, all are spread, and the folders of the training
    environment are one group: importing its libraries takes longer than the tests of the small ones.
    """
    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for folder, environment in ENVIRONMENTS.items():
        if paths:
            if chosen := [path for path in paths if path.split("/")[1] == folder]:
                found[folder, environment] = chosen
        elif folder == "pipelines":
            parts = dict.fromkeys(["pipelines-1", "pipelines-2", "pipelines-3"], 0.0)
            files = sorted(path.relative_to(ROOT).as_posix() for path in (TESTS / folder).glob("test_*.py"))
            for file in sorted(files, key=lambda file: -seconds_of.get(file, 0.0)):
                name = "pipelines-on-clusters"
                if fast or not ON_CLUSTERS.search(file):
                    name = min(parts, key=parts.__getitem__)
                    parts[name] += seconds_of.get(file, 0.0)
                found[name, environment].append(file)
        else:
            found["training" if fast and environment == "training" else folder, environment].append(f"tests/{folder}")
    return dict(found)


def test_tools() -> Path:
    """pytest for the stages' environments, which stay as they are: a folder of its own, put last on the path."""
    home = Path(os.environ.get("RATCHET_HOME") or Path.home() / ".cache/ratchet")
    folder = home / f"test-tools-{crc32(LOCK.read_bytes()):08x}"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", part, "-r", LOCK], check=True)
        part.rename(folder)
    return folder


def run_all(checks: list[Check], lanes: int, shared: str) -> None:
    """Run everything, so many at a time; `shared` is a directory for what several of them make only once."""
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
        waiting.clear()  # Ctrl-C has reached what runs; nothing else is to begin
        for worker in workers:
            worker.join()
        raise


def failed_tests(checks: list[Check], reports: Path) -> list[tuple[str, Check]]:
    """The names of checks that failed by a few tests alone, each with a check that runs these; none if they are many.

    Where a process ended without a report of each test, nobody knows what it has not come to.
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
        found.append((check.name, Check(f"{check.name}, what has failed, alone", command, 0, report)))
    return found


def has_failed(case: ElementTree.Element) -> bool:
    """Whether a test failed, or what it needs."""
    return any(child.tag in ("failure", "error") for child in case)


def node_id(case: ElementTree.Element) -> str:
    """What pytest calls a test."""
    parts = case.get("classname", "").split(".")
    length = next(count for count in range(len(parts), 0, -1) if file_of(parts[:count]).exists())
    path = file_of(parts[:length]).relative_to(ROOT).as_posix()
    return "::".join([path, *parts[length:], case.get("name", "")])


def store_durations(checks: list[Check]) -> None:
    """Write how long each test function took, its variants of a tier together; the short ones of a file as one sum."""
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
    """Where a module would be."""
    return ROOT.joinpath(*parts).with_suffix(".py")


def summary(checks: list[Check], again: Mapping[str, Check]) -> int:
    """Print one line for everything. A check that failed without a failed test counts as one.

    Args:
        checks: all of them.
        again: by the names of those that failed, their failed tests, run alone.
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
                print(f"FAILED BESIDE OTHERS, passed alone: {node_id(case)}")
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
