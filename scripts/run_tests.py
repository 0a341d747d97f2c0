"""The linters, the types and the tests, each test in the environment of what it tests; scripts/test.sh calls this.

Without a choice of paths, three lanes work side by side, each through one check after another, the longest first: one
more than the two cores that they are made for, since the tests of clusters wait most of the time. What a check has
printed comes out as a whole when it ends. With paths, one runs after the other, and prints as it goes.
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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from zlib import crc32

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
DURATIONS = TESTS / "durations.json"
LOCK = ROOT / "configs/environments/test.txt"
ENVIRONMENTS = {
    "contracts": "driver", "pipelines": "driver", "environments": "driver", "docs": "driver",
    "embedded": "training", "training": "training", "benchmarks": "training",
    "annotation": "annotation", "generation": "generation", "tracking": "tracking",
}  # fmt: skip
"""The environment of each folder's tests."""
FAST = "not slow and not cluster and not chaos"
FLAGS = ("--fast", "--store-durations")
LANES = 3
ON_CLUSTERS = re.compile(r"_(chain|slurm|fake_slurm|dev_slurm)\.py$")
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
        if "--store-durations" in chosen:
            store_durations(checks)
        return summary(checks)


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
    """One for each folder that has something to run."""
    stored = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
    checks = []
    for folder, environment in ENVIRONMENTS.items():
        chosen = [path for path in paths if path.split("/")[1] == folder] if paths else [f"tests/{folder}"]
        groups = {folder: chosen} if chosen else {}
        if not paths and folder == "pipelines":  # by far the largest: its tests of clusters are a group of their own
            files = sorted(path.relative_to(ROOT).as_posix() for path in (TESTS / folder).glob("test_*.py"))
            groups = {
                "pipelines": [file for file in files if not ON_CLUSTERS.search(file)],
                "pipelines-on-clusters": [file for file in files if ON_CLUSTERS.search(file)],
            }
        for name, group in groups.items():
            known = [
                seconds
                for file, tests in stored.items()
                for test, seconds in tests.items()
                if file.startswith(tuple(group)) and not (FAST in options and "(" in test)
            ]
            report = reports / f"{name}.xml"
            choice = "some" if options else "all"
            command = [interpreter(environment), "-c", PYTEST, str(test_tools()), choice, f"--junit-xml={report}"]
            seconds = sum(known) or UNKNOWN_SECONDS
            checks.append(Check(f"tests/{name} ({environment})", [*command, *group, *options], seconds, report))
    return checks


def interpreter(environment: str) -> str:
    """The Python of an environment."""
    if environment == "driver":
        return str(ROOT / ".venv/bin/python")
    command = [ROOT / ".venv/bin/pipeline", "env", "python", environment]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


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
    for worker in workers:
        worker.join()


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


def summary(checks: list[Check]) -> int:
    """Print one line for everything. A check that failed without a failed test counts as one."""
    passed = failed = skipped = 0
    for check in checks:
        bad = 0
        for case in check.cases():
            kinds = {child.tag for child in case}
            bad += bool(kinds & {"failure", "error"})
            skipped += "skipped" in kinds
            passed += not kinds & {"failure", "error", "skipped"}
        if check.code:
            print(f"FAILED: {check.name}")
            bad = max(1, bad)
        failed += bad
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(any(check.code for check in checks))


if __name__ == "__main__":
    sys.exit(main())
