"""The command line: its help, completion, machine-readable output, logs that are followed, and the remaining time."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from pipelines_smallest import COMMAND, pipeline, write_pretended

from contracts.attempt import ATTEMPT, report_metrics
from contracts.points import REPORTS
from contracts.stages.prompts import IMPORT_PROMPTS
from pipelines.commands.declaring import COMMANDS, GROUPS, HELP
from pipelines.config.executor import ExecutorSection
from pipelines.config.placement import PlacementSection
from pipelines.execution.endings import latest_metrics
from pipelines.graph import Graph
from pipelines.insight.event_text import metrics_in_words, notable_lines
from pipelines.insight.remaining_time import RemainingTime, in_words
from pipelines.main import PARSER, main
from pipelines.planning.cluster import Cluster
from pipelines.run.events import HookFailed, StagePublished, StageReused, StageStarted


def test_the_help_has_every_command_in_a_group_and_the_exit_codes() -> None:
    shown = PARSER.format_help()
    assert set(COMMANDS.choices) == set(HELP)
    assert all(f"  {name} " in shown for name in COMMANDS.choices)
    assert all(title in shown for title in GROUPS.values())
    assert "exit codes:" in shown


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_valid_in_its_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--detach" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runz"], "there is no 'runz'. Did you mean 'run' or 'runs'?"),
        (["env", "synk"], "there is no 'synk'. Did you mean 'sync'?"),
        (["env", "sync", "--variant", "q"], "there is no 'q'. Known: auto, cpu, gpu."),
        (["logs", "runs/a", "--lines", "-5"], "--lines: '-5' is not a whole number of at least 1"),
        (["logs", "runs/a", "--lines", "0"], "--lines: '0' is not a whole number of at least 1"),
    ],
)
def test_mistakes_in_the_command_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def at_once(parallel: int) -> Cluster:
    """A machine that runs so many stages at once."""
    return Cluster(ExecutorSection(), PlacementSection(), gpus=0, cores=1, parallel=parallel)


class Clock:
    """A graph of stages of one role each in three iterations, each after the one before."""

    def __init__(self, folder: Path) -> None:
        source = folder / "prompts.jsonl"
        source.write_text('{"prompt": "so?"}\n')
        self.graph = Graph(folder / "run")
        for iteration in (1, 2, 3):
            before = self.graph.directory / f"iteration-{iteration - 1:03d}"
            for role in ("sample", "train"):
                needed = {
                    "sample": before / "train",
                    "train": self.graph.directory / f"iteration-{iteration:03d}/sample",
                }
                path = source if (iteration, role) == (1, "sample") else needed[role]
                self.graph.add(IMPORT_PROMPTS, role, {"source": path}, iteration=iteration)

    def remaining(self, *events: StagePublished | StageStarted | StageReused, **shares: float) -> float | None:
        found = RemainingTime(self.graph, at_once(1))
        found.update(list(events))
        return found.seconds({name.replace("__", "/").replace("_", "-"): share for name, share in shares.items()})


def published(stage: str, seconds: float) -> StagePublished:
    return StagePublished(stage=stage, key="", seconds=seconds)


def test_the_remaining_time_is_that_of_the_same_stages_before(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    assert clock.remaining() is None
    assert clock.remaining(published("iteration-001/sample", 10)) is None, "nobody has seen a training"
    first = [published("iteration-001/sample", 10), published("iteration-001/train", 30)]
    assert clock.remaining(*first) == pytest.approx(2 * 40)
    now = time.time()
    begun = StageStarted(stage="iteration-002/sample", reason="", key="", attempt="", time=now - 4)
    left = clock.remaining(*first, begun)
    assert left is not None
    assert 76 - (time.time() - now) - 0.001 <= left <= 76 + 0.001
    reused = StageReused(stage="iteration-002/sample", reason="", key="")
    assert clock.remaining(*first, reused) == pytest.approx(30 + 40)


def test_stages_that_run_at_once_count_once(tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "so?"}\n')
    graph = Graph(tmp_path / "run")
    for iteration in (1, 2):
        for role in ("one", "two", "three"):
            graph.add(IMPORT_PROMPTS, role, {"source": source}, iteration=iteration)
    done = [published(f"iteration-001/{role}", seconds) for role, seconds in (("one", 10), ("two", 20), ("three", 30))]
    for parallel, expected in ((1, 60), (2, 40), (3, 30)):
        remaining = RemainingTime(graph, at_once(parallel))
        remaining.update(list(done))
        assert remaining.seconds({}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, ""),
        (3, "about 10 s left"),
        (80, "about 80 s left"),
        (600, "about 10 min left"),
        (7000, "about 1.9 h left"),
    ],
)
def test_a_remaining_time_is_not_more_exact_than_it_can_be(seconds: float | None, words: str) -> None:
    assert in_words(seconds) == words


def test_a_damaged_run_is_one_row_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / "bad" / "events.jsonl").mkdir()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["damaged", "new"]
    assert main(["runs", str(tmp_path)]) == 0


def test_what_others_have_written_does_not_act_on_the_terminal() -> None:
    (line,) = notable_lines([HookFailed(hook="mine", error="boom \x1b[31mred\u202e", time=1.0)])
    assert "\x1b" not in line
    assert "boom \\x1b[31mred\\u202e" in line


@pytest.mark.slow
def test_what_reads_a_run_speaks_json_and_logs_are_followed_until_it_is_over(tmp_path: Path) -> None:
    config = write_pretended(tmp_path, iteration_001__training=["wait"])
    run = tmp_path / "runs" / "pretended"
    driver = subprocess.Popen(
        [*COMMAND, "run", str(config), "--iters", "1", "--quiet", "--plain"], stdout=subprocess.PIPE
    )
    try:
        log = run / "logs/iteration-001/training/attempt-1/stage.log"
        deadline = time.monotonic() + 120
        while not (log.exists() and "pretends to wait" in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        follower = subprocess.Popen(
            [*COMMAND, "logs", str(run), "iteration-001/training", "--follow"], stdout=subprocess.PIPE, text=True
        )
        (row,) = json.loads(pipeline("runs", str(tmp_path), "--json").stdout)
        assert (row["state"], row["iteration"]) == ("running", 0)
        status = json.loads(pipeline("status", str(run), "--json").stdout)
        assert {stage["stage"]: stage["state"] for stage in status["stages"]}["iteration-001/training"] == "running"
        (tmp_path / "interpreter" / "release-iteration-001-training").touch()
        said, _ = follower.communicate(timeout=120)
        assert "pretends to wait" in said
        assert "published" in said
    finally:
        output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0
    text = output.decode()
    assert not {"run    ", "done   ", "\x1b", "┃"} & {
        part for part in ("run    ", "done   ", "\x1b", "┃") if part in text
    }
    assert "Best checkpoint" in text
    (row,) = json.loads(pipeline("runs", str(tmp_path), "--json").stdout)
    assert (row["state"], row["stages"].partition("/")[0]) == ("finished", row["stages"].partition("/")[2])
    assert "has no stage 'nothere'" in pipeline("logs", str(run), "nothere").stderr
    assert (
        "no log of a part 'task-7'" in pipeline("logs", str(run), "iteration-001/training", "--part", "task-7").stderr
    )
    assert pipeline("runs", str(tmp_path / "interpreter")).returncode == 2


def test_what_a_running_stage_has_reported_last_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTEMPT, str(tmp_path))
    assert latest_metrics(tmp_path) == {}
    for step in range(1, 400):
        report_metrics("step", step, {"learning_rate": 1e-5, "margin": 0.01 * step, "loss": 1 / step, "grad_norm": 2.0})
    assert latest_metrics(tmp_path)["loss"] == 1 / 399
    (file,) = tmp_path.glob(REPORTS)
    with file.open("ab") as content:
        content.write(b'{"unit":"step","number":400,"ti')  # of a process that was killed while it wrote
    assert metrics_in_words(latest_metrics(tmp_path)) == "loss 0.00251, margin 3.99, grad norm 2"
    assert metrics_in_words({"score_mean": 0.5, "tokens_per_second": 1234.5}) == "score mean 0.5, tokens/s 1.23e+03"
