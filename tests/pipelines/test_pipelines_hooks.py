"""Hooks: what they are told, after kills as well; and that nothing that they do touches the run."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from forked import Forked
from pipelines_cluster import FakeCluster, wait_for
from pipelines_slurm_run import SlurmRun
from pipelines_smallest import pipeline, write_pretended

from contracts.points import METRICS, Point
from pipelines.config.load import load_run_config
from pipelines.insight.event_text import notable_lines, of_current_config
from pipelines.insight.hooks.task import HookTask, Progress
from pipelines.main import main
from pipelines.run.directory import RunDirectory
from pipelines.run.events import (
    FILE,
    EventStream,
    HookFailed,
    StageFailed,
    StagePublished,
    StageReused,
    StageStarted,
    TrackerFailed,
)

HOOKS = '''
"""Hooks of a user."""

import json
import os
import time
from pathlib import Path


def note(happening, run, to):
    """Keep all that it is told."""
    with open(to, "a") as file:
        file.write(json.dumps(happening) + "\\n")


def note_slowly(happening, run, to, seconds):
    note(happening, run, to)
    time.sleep(seconds)


def fail(happening, run, to):
    note(happening, run, to)
    raise ValueError(f"no such channel: {run.name}")


def leave(happening, run):
    os._exit(0)


def hang(happening, run, to):
    note(happening, run, to)
    while not (Path(to).parent / "go-on").exists():
        time.sleep(0.02)


async def wait(happening, run):
    pass


def settings_only(to):
    pass
'''


class HookedRun:
    """A run whose stages pretend to work, with hooks."""

    def __init__(self, folder: Path, executor: str = "inline", **acts: list[str]) -> None:
        self.folder = folder
        self.config = write_pretended(folder, executor={"kind": executor}, **acts)
        self.path = folder / "runs" / "pretended"
        (folder / "hooks.py").write_text(HOOKS)

    def hook(self, name: str, function: str = "note", *, notes: bool = True, **keys: Any) -> None:
        """Add a hook to the config; `notes`: it takes the file that it writes to."""
        config = yaml.safe_load(self.config.read_text())
        settings = {**({"to": str(self.folder / name)} if notes else {}), **keys.pop("settings", {})}
        hook = {"function": f"{self.folder}/hooks.py:{function}", "settings": settings, **keys}
        config.setdefault("hooks", {})[name] = hook
        self.config.write_text(yaml.safe_dump(config))

    def run(self, iterations: int = 1) -> str:
        """Run it to its end; returns what was printed."""
        result = pipeline("run", str(self.config), "--iters", str(iterations))
        assert result.returncode == 0, result.stderr
        return result.stdout

    def told(self, name: str) -> list[dict[str, Any]]:
        """What a hook was told."""
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def failures(self, hook: str) -> list[str]:
        """What is recorded of a hook's failures."""
        events = RunDirectory(self.path).events()
        return [event.error for event in events if isinstance(event, HookFailed) and event.hook == hook]


def stages(told: list[dict[str, Any]], what: str) -> list[str]:
    return [happening["stage"] for happening in told if happening["kind"] == "stage" and happening["what"] == what]


@pytest.mark.slow
def test_a_hook_is_told_everything_once_and_in_order(tmp_path: Path) -> None:
    run = HookedRun(tmp_path, iteration_001__training=["kill"])
    run.hook("all", kinds=["run", "iteration", "stage", "step", "shard"])
    run.hook("iterations", kinds=["iteration"])
    run.run()
    told = run.told("all")

    assert [happening["what"] for happening in told if happening["kind"] == "run"] == ["started", "finished"]
    assert told[0]["stages"] == len(stages(told, "published"))
    published = {event.stage for event in RunDirectory(run.path).events() if isinstance(event, StagePublished)}
    assert sorted(stages(told, "published")) == sorted(published)
    assert Counter(stages(told, "started")) == Counter(published) + Counter(["iteration-001/training"])
    (failed,) = [happening for happening in told if happening.get("what") == "failed"]
    assert (failed["stage"], failed["failure"]) == ("iteration-001/training", "transient")
    assert failed["retry_in"] > 0
    training = next(
        happening
        for happening in told
        if happening.get("stage") == "iteration-001/training" and happening.get("what") == "published"
    )
    assert training["path"] == str(run.path / "iteration-001/training")

    iterations = run.told("iterations")
    assert [happening["iteration"] for happening in iterations] == [0, 1]
    assert iterations[1]["policy"] == str(run.path / "iteration-001/training")
    assert iterations[1]["metrics"] == {"iteration": 1, "reward_mean": 0.5, "kl": None}
    assert iterations == [happening for happening in told if happening["kind"] == "iteration"]

    steps = [happening for happening in told if happening["kind"] == "step"]
    assert [(step["step"], step["global_step"], step["metrics"]["train/loss"]) for step in steps] == [
        (1, 1, 1.0),
        (2, 2, 0.5),
    ]
    assert all(earlier["time"] <= later["time"] for earlier, later in itertools.pairwise(steps))

    run.run()
    assert [happening["what"] for happening in run.told("all")[len(told) :]] == ["started", "finished"]
    assert f"{run.path}/hooks" not in pipeline("verify", str(run.path)).stdout
    assert len(run.told("iterations")) == 2


@pytest.mark.slow
def test_a_hook_that_is_added_later_begins_with_what_is_new(tmp_path: Path) -> None:
    run = HookedRun(tmp_path)
    run.run(0)
    run.hook("late", kinds=["run", "iteration", "stage", "step"])
    run.run(1)
    told = run.told("late")
    assert [happening["iteration"] for happening in told if happening["kind"] == "iteration"] == [1]
    assert {stage.partition("/")[0] for stage in stages(told, "published")} == {"iteration-001"}


@pytest.mark.slow
def test_what_another_run_has_made_did_not_happen(tmp_path: Path) -> None:
    first = HookedRun(tmp_path)
    first.run()
    first.hook("all", kinds=["run", "iteration", "stage", "step", "shard"])
    done = pipeline("run", str(first.config), "--iters", "1", "name=second", "--share", str(first.path))
    assert done.returncode == 0, done.stderr
    reused = [event for event in RunDirectory(tmp_path / "runs/second").events() if isinstance(event, StageReused)]
    assert "iteration-001/training" in [event.stage for event in reused]
    assert {event.reason for event in reused} == {f"reused from {first.path}"}
    assert [happening["kind"] for happening in first.told("all")] == ["run", "run"]
    assert not [*(tmp_path / "runs/second/superseded").rglob("*.run")]


def test_the_process_of_a_hook_loads_no_configuration() -> None:
    """Which would take it most of a second."""
    code = "import sys, pipelines.insight.hooks.__main__; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_is_told_of_hooks_and_trackers_that_are_gone(smallest: Path) -> None:
    events = [HookFailed(hook="gone", error="boom"), TrackerFailed(tracker="mlflow", error="boom")]
    theirs = ["hooks.gone.function=hooks.py:note", "tracking.mlflow={}"]
    assert of_current_config(events, load_run_config(smallest, theirs)) == events
    assert of_current_config(events, load_run_config(smallest, [])) == []


def test_a_hook_that_raises_is_told_of_once_and_the_run_goes_on(tmp_path: Path) -> None:
    run = HookedRun(tmp_path)
    run.hook("broken", "fail")
    run.hook("good")
    said = run.run(0)
    assert len(run.told("broken")) == len(run.told("good")) > 10
    (error,) = run.failures("broken")
    assert error.startswith("on the run: started: ValueError: no such channel: pretended (it is still called")
    assert f"warning: the hook broken failed: {error}" in said
    log = run.path / "logs/hooks/broken.log"
    assert str(log) in error
    assert log.read_text().count("ValueError: no such channel: pretended\n") == len(run.told("broken"))
    assert any("the hook broken failed" in line for line in notable_lines(RunDirectory(run.path).events()))
    assert run.failures("good") == []


@pytest.mark.slow
def test_a_hook_that_hangs_is_ended_after_its_grace_and_told_the_same_again(tmp_path: Path) -> None:
    run = HookedRun(tmp_path)
    run.hook("stuck", "hang", kinds=["iteration"], grace_seconds=0.5)
    run.hook("good", kinds=["iteration"])
    said = run.run(0)
    assert [happening["iteration"] for happening in run.told("stuck")] == [0]
    assert [happening["iteration"] for happening in run.told("good")] == [0]
    (error,) = run.failures("stuck")
    assert error.startswith("it was not done in time and was ended")
    assert "warning: the hook stuck failed: it was not done in time" in said
    (tmp_path / "go-on").touch()
    run.hook("stuck", "hang", kinds=["iteration"])
    run.run(0)
    assert [happening["iteration"] for happening in run.told("stuck")] == [0, 0]
    assert len(run.failures("stuck")) == 1


@pytest.mark.slow
def test_a_hook_that_ends_its_process_is_told_of_and_the_run_goes_on(tmp_path: Path) -> None:
    run = HookedRun(tmp_path)
    run.hook("leaving", "leave", notes=False)
    run.run(0)
    (error,) = run.failures("leaving")
    assert error.startswith("no message (exit code 0; ")


@pytest.mark.slow
def test_the_driver_killed_at_any_instant_leaves_nothing_untold_and_nothing_told_twice(tmp_path: Path) -> None:
    names = ["setup/world", "iteration-000/heldout/generation", "iteration-001/training"]
    run = HookedRun(tmp_path, "local", **{name.replace("/", "__").replace("-", "_"): ["wait"] for name in names})
    run.hook("all", kinds=["iteration", "stage", "step"])
    chance = random.Random(3)
    for name in names:  # every driver is killed at about the instant in which a stage publishes
        driver = Forked("pipelines", "run", str(run.config), "--iters", "1")
        log = run.path / "logs" / name / "attempt-1" / "stage.log"
        wait_for(lambda log=log: log.exists() and "wait" in log.read_text(), 200, f"{name} waits")
        (tmp_path / "interpreter" / f"release-{name.replace('/', '-')}").touch()
        wait_for(lambda name=name: (run.path / name / "manifest.json").exists(), 200, f"{name} is published")
        time.sleep(chance.uniform(0.0, 0.1))
        driver.kill()
        driver.wait()
    run.run()
    told = run.told("all")
    assert Counter(stages(told, "published")).most_common(1)[0][1] == 1
    assert set(stages(told, "published")) >= {*names, "iteration-001/evaluation"}
    assert [happening["iteration"] for happening in told if happening["kind"] == "iteration"] == [0, 1]
    assert [happening["step"] for happening in told if happening["kind"] == "step"] == [1, 2]


class Told:
    """A run's files, written while the process of a hook reads them."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.run.mkdir()
        (folder / "hooks.py").write_text(HOOKS)
        self.notes = folder / "notes"
        self.stream = EventStream(self.run / FILE)
        self.count = 0
        settings = {"to": str(self.notes), "seconds": 0.002}
        function = f"{folder}/hooks.py:note_slowly"
        self.task = HookTask("slow", function, settings, ["stage", "step"], str(self.run), 60.0, [])
        Progress.now(self.run).save(self.run, "slow")

    def write(self) -> None:
        """A stage that starts, makes a step, and publishes or fails."""
        stage = f"stage-{self.count}"
        self.stream.append(StageStarted(stage=stage, reason="", key="k", attempt="attempt-1"))
        self.step(stage)
        if self.count % 3:
            self.stream.append(StagePublished(stage=stage, key="k"))
        else:
            self.stream.append(StageFailed(stage=stage, attempt="attempt-1", kind="user", how="badly", retry_in=None))
        self.count += 1

    def step(self, stage: str) -> None:
        """A step of a stage, in the run's metrics."""
        point = Point(
            point=self.count, time=1.0, stage=stage, key="k", unit="step", number=1, iteration=0, global_step=1,
            metrics={"train/loss": 0.5},
        )  # fmt: skip
        with (self.run / METRICS).open("ab") as file:
            file.write(msgspec.json.encode(point) + b"\n")

    def start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.insight.hooks"], stdin=subprocess.PIPE, start_new_session=True
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(self.task) + b"\n")
        process.stdin.flush()
        return process


def test_steps_of_a_stage_that_was_taken_over_are_not_told(tmp_path: Path) -> None:
    told = Told(tmp_path)
    told.write()
    told.stream.append(StageReused(stage="shared", reason="reused from runs/other", key="k"))
    told.step("shared")
    told.write()
    told.start().communicate(timeout=200)
    happenings = [json.loads(line) for line in told.notes.read_text().splitlines()]
    assert [happening["stage"] for happening in happenings if happening["kind"] == "step"] == ["stage-0", "stage-1"]


@pytest.mark.slow
def test_a_hook_killed_at_any_instant_misses_nothing_and_is_told_one_thing_again_at_most(tmp_path: Path) -> None:
    told = Told(tmp_path)
    chance = random.Random(1)
    kills = 8
    for _ in range(kills):
        process = told.start()
        deadline = time.monotonic() + chance.uniform(0.4, 1.2)
        while time.monotonic() < deadline:
            told.write()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = told.start()
    process.communicate(timeout=200)
    assert process.returncode == 0
    lines = Counter(told.notes.read_text().splitlines())
    happenings = [json.loads(line) for line in lines]
    for number in range(told.count):
        own = {happening.get("what", "step") for happening in happenings if happening["stage"] == f"stage-{number}"}
        assert own == {"started", "step", "published" if number % 3 else "failed"}
    assert len(lines) == 3 * told.count > 100
    assert sum(lines.values()) - len(lines) <= kills


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"function": "hooks.py:nope"}, "hooks.bad: function 'hooks.py:nope': hooks.py has no function 'nope'"),
        ({"function": "nothere.py:notify"}, "hooks.bad: function 'nothere.py:notify': no module or file"),
        ({"function": "hooks.py:wait"}, "hooks.bad: function 'hooks.py:wait' is async"),
        (
            {"function": "hooks.py:note", "settings": {"too": 3}},
            "takes (happening, run, to), but is called as note(happening, run, too=...): missing a required argument",
        ),
        ({"function": "raising.py:notify"}, "cannot be imported: ModuleNotFoundError: No module named 'slack'"),
        ({"function": "leaving.py:notify"}, "ended the process that imports it (exit code 3)"),
        ({"function": "hooks.py:note", "kinds": ["stages"]}, "'hooks.bad.kinds.0' is 'stages'"),
        ({"function": "hooks.py:note", "kind": []}, "unknown key 'hooks.bad.kind'. Did you mean 'hooks.bad.kinds'"),
    ],
)
def test_a_function_that_cannot_be_called_is_told_before_the_run_starts(
    tmp_path: Path, hook: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = HookedRun(tmp_path)
    (tmp_path / "raising.py").write_text("import slack\n\ndef notify(happening, run): ...\n")
    (tmp_path / "leaving.py").write_text("import os\nos._exit(3)\n\ndef notify(happening, run): ...\n")
    config = yaml.safe_load(run.config.read_text())
    run.config.write_text(yaml.safe_dump({**config, "hooks": {"bad": hook}}))
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(run.config)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not run.path.exists()


def test_doctor_looks_at_hooks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = HookedRun(tmp_path)
    run.hook("good")
    main(["doctor", str(run.config)])
    assert "ok       hooks: can be imported and called: good" in capsys.readouterr().out
    run.hook("bad", "settings_only")
    main(["doctor", str(run.config)])
    found = capsys.readouterr().out
    assert "error    hooks: hooks.bad: function" in found
    assert "is called as settings_only(happening, run, to=...)" in found


@pytest.mark.slow
def test_the_jobs_of_a_detached_run_tell_hooks_as_a_driver_does(tmp_path: Path, fake_cluster: FakeCluster) -> None:
    run = SlurmRun.pretended(tmp_path, fake_cluster)
    hooked = HookedRun.__new__(HookedRun)
    hooked.folder, hooked.config, hooked.path = tmp_path, run.config, run.path
    (tmp_path / "hooks.py").write_text(HOOKS)
    hooked.hook("all")
    run.detach(iterations=0)
    run.wait()
    told = hooked.told("all")
    assert sorted(stages(told, "published")) == sorted(run.digests())
    assert sorted(stages(told, "started")) == sorted(run.digests())
    assert [happening["iteration"] for happening in told if happening["kind"] == "iteration"] == [0]
    assert [happening["what"] for happening in told if happening["kind"] == "run"] == ["started", "finished"]
    assert hooked.failures("all") == []
