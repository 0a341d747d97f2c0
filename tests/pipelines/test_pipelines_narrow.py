"""What commands print on a terminal that is narrower than their tables."""

import io
import re
from pathlib import Path

import pytest

from pipelines.commands.declaring import Screen, open_run
from pipelines.insight.display import Display
from pipelines.insight.plan import timeline, view_plan
from pipelines.main import main
from pipelines.planning.cluster import cluster_of
from pipelines.planning.placement import place
from pipelines.run.directory import RunDirectory
from pipelines.run.events import RunStarted, StageStarted

WIDE = 300
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, width: int, *command: str) -> list[str]:
    """The lines of a command's output on a terminal of so many characters."""
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": str(width), "LINES": "50"}.items():
        patch.setenv(name, value)
    assert main(command) == 0
    return ANSI.sub("", capsys.readouterr().out).splitlines()


@pytest.mark.parametrize("width", [40, 60, 80])
@pytest.mark.parametrize("command", ["status", "runs", "compare", "plan"])
def test_every_value_of_a_table_is_whole(
    command: str, width: int, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {
        "status": ["status", str(run)],
        "runs": ["runs", str(run.parent)],
        "compare": ["compare", str(run), str(run)],
        "plan": ["plan", "show", str(run)],
    }[command]
    wide = on_terminal(capsys, monkeypatch, WIDE, *words)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in wide if line.startswith("│")]
    assert rows, "a wide terminal has a table"
    narrow = on_terminal(capsys, monkeypatch, width, *words)
    assert not any("…" in line for line in narrow)
    said = " ".join("\n".join(narrow).split())
    for value in {value for row in rows for value in row}:
        assert value in said or value in said.replace(" ", ""), "folded where it is longer than a line"
    for line in narrow:
        if line.startswith(("│", "┃", "  state", "  iterations", "  reward")):
            assert len(line) <= width


def test_a_timeline_fits(run: Path) -> None:
    opened_run, graph = open_run(run)
    cluster = cluster_of(opened_run.config)
    view = view_plan(place(graph, cluster), opened_run.config, cluster, opened_run.events())
    for width in (40, 60):
        lines = timeline(view, room=width)
        assert len(lines) > 1
        assert all(len(line) <= width for line in lines)
    assert timeline(view, room=WIDE) == timeline(view)


@pytest.mark.parametrize("width", [40, 60, 200])
def test_the_live_table_names_every_stage_that_runs(width: int, run: Path) -> None:
    said = io.StringIO()
    console = Screen(file=said, force_terminal=True, width=width, height=50, color_system=None)
    opened_run, graph = open_run(run)
    names = ["iteration-001/heldout/generation", "setup/reward-model/training", "iteration-002/training"]
    begun = [StageStarted(stage=name, key="", reason="", attempt="attempt-1", time=1.0) for name in names]
    with Display(console, RunDirectory(opened_run.path), graph) as display:
        display([RunStarted(stages=len(graph.nodes), by="test", time=1.0), *begun])
    shown = ANSI.sub("", said.getvalue())
    for name in names:
        assert name in shown
    assert "…" not in shown
    table = shown[shown.index(f"0 of {len(graph.nodes)} stages") :]
    assert all(len(line) <= width for line in table.splitlines())
