"""The report that is written by itself, and the one that is served while a run goes on."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import pytest
from reported import gathered

from pipelines.commands.declaring import open_run
from pipelines.insight.listeners import page as listener
from pipelines.insight.listeners.page import PageWriter
from pipelines.insight.report import view
from pipelines.insight.report.view import LiveReport, make_server
from pipelines.main import main
from pipelines.run.directory import RunDirectory
from pipelines.run.events import (
    Event,
    ListenerFailed,
    RunEnded,
    RunStarted,
    StagePublished,
    StageReused,
    StageWaits,
)


def test_page_is_written_by_itself(pretended_run: Path) -> None:
    """A run of pretended stages ends with a report, though nothing in it can be read as answers."""
    text = (pretended_run / "report.html").read_text()
    assert '<span class="badge finished">finished</span>' in text
    assert "2 of 2 policies evaluated" in text
    assert not any(isinstance(event, ListenerFailed) for event in RunDirectory(pretended_run).events())


def test_page_is_written_when_something_has_happened(run: Path) -> None:
    """After each policy that is judged, at the end of the run if anything was published since, and at a failure."""
    page = run / "report.html"
    page.write_text("")
    writer = PageWriter(*open_run(run))

    def writes(*events: Event) -> bool:
        page.write_text("")
        writer(list(events))
        return page.read_text() != ""

    reused = StageReused(stage="iteration-001/evaluation", reason="it is there", key="k")
    assert not writes(RunStarted(stages=26, by="me"), reused)
    assert not writes(RunEnded(outcome="finished"))
    assert not writes(StagePublished(stage="iteration-001/training", key="k"))
    assert writes(StagePublished(stage="iteration-001/evaluation", key="k"))
    assert not writes()
    assert not writes(StagePublished(stage="iteration-002/evaluation", key="k")), "the end of the run comes at once"
    assert writes(RunEnded(outcome="finished"))
    assert writes(RunEnded(outcome="failed"))


def test_large_reports_are_made_elsewhere(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many new answers are left to a process of its own; what goes wrong there is raised once."""
    monkeypatch.setattr(listener, "INLINE_BYTES", 10)
    writer = PageWriter(*open_run(run))
    writer([StagePublished(stage="iteration-002/generation", key="k")])
    assert not (run / "report.html").exists()
    writer([StagePublished(stage="iteration-001/evaluation", key="k")])
    writer([RunEnded(outcome="finished")])
    assert "3 of 3 policies evaluated" in (run / "report.html").read_text()
    (run / "run.json").write_text("{}")
    writer([StagePublished(stage="iteration-002/generation", key="k")])
    with pytest.raises(RuntimeError, match=r"run\.json is damaged.*exit code 2"):
        writer([RunEnded(outcome="failed")])


@pytest.fixture
def served(run: Path) -> Iterator[tuple[Path, int]]:
    """A run that `pipeline view` serves, and the port."""
    server = make_server(LiveReport(lambda: open_run(run)), 0)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield run, int(server.server_address[1])
    server.shutdown()
    server.server_close()
    thread.join()


def test_view(served: tuple[Path, int]) -> None:
    """The page, its chunks and its version; nothing else, for nobody else, and nothing is written."""
    run, port = served
    before = sorted(run.rglob("*"))
    address = f"http://127.0.0.1:{port}"

    def get(path: str) -> str:
        with urllib.request.urlopen(address + path, timeout=200) as answer:
            return str(answer.read().decode())

    page = get("/")
    assert 'data-chunk="' not in page.replace('[data-chunk="', "")
    assert get("/version") == "1"
    key = gathered(run).sets[0].key
    assert get(f"/samples/{key}-0.js").startswith(f'ratchetChunk("{key}-0","')
    for path in ("/samples/0123456789abcdef-0.js", "/run.json", "/samples/../run.json", "/%2e%2e/run.json"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(path)
    connection = HTTPConnection("127.0.0.1", port, timeout=200)
    connection.request("GET", "/", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 403
    assert sorted(run.rglob("*")) == before


def test_view_sees_what_happens(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new event makes a new version, where it changes what the report says."""
    monkeypatch.setattr(view, "POLL_SECONDS", -1.0)
    live = LiveReport(lambda: open_run(run))
    assert live.renew() == 1
    assert live.renew() == 1
    RunDirectory(run).record(StageWaits(stage="iteration-002/evaluation", text="for a machine"))
    assert live.renew() == 1, "an event that changes nothing in the report"
    (run / "iteration-002/evaluation/manifest.json").unlink()
    RunDirectory(run).record(StageWaits(stage="iteration-002/evaluation", text="for a machine"))
    assert live.renew() == 2
    assert b"2 of 3 policies evaluated" in live.page()


def test_port_in_use(served: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    """A port that is taken is a mistake with a way out."""
    run, port = served
    assert main(["view", str(run), "--port", str(port)]) == 2
    assert "Choose another one with --port" in capsys.readouterr().err
    assert main(["view", str(run), "--port", "70000"]) == 2
