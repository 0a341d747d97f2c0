"""The report in a real browser: a phone and a desk, light and dark, from a file and from `pipeline view`."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser
from handmade import HandmadeRun
from reported import ReportedRun

from contracts.artifacts import Artifact
from contracts.records import Pair, Rollout
from pipelines.commands.declaring import open_run
from pipelines.insight.report import page
from pipelines.insight.report.command import write_report
from pipelines.insight.report.view import LiveReport, make_server
from pipelines.iteration import build_graph
from pipelines.run.directory import RunDirectory
from pipelines.run.events import StageWaits

pytestmark = pytest.mark.slow

PHONE, DESK = (390, 844), (1440, 1000)
HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2">\x1b[31m\u202eabc\u0007 {word}'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> HandmadeRun:
    """A run whose answers get longer, and contain what could hurt a page."""
    return ReportedRun(
        tmp_path_factory.mktemp("page"),
        length=lambda iteration, sample: 3 + 2 * iteration + sample,
        score=lambda iteration, length: length / 2,
        texts=lambda text: HOSTILE.replace("{word}", text),
    ).build()


@pytest.fixture(scope="module")
def address(made: HandmadeRun) -> str:
    """Of its page, as a file."""
    write_report(*open_run(made.path), made.path / "report.html")
    return (made.path / "report.html").as_uri()


def text_of(browser: Browser, selector: str) -> str:
    """The text of an element."""
    return str(browser.run(f"document.querySelector({json.dumps(selector)}).innerText"))


def choose(browser: Browser, label: str, value: str) -> None:
    """Set a field of the browser of samples."""
    browser.run(
        f"(() => {{ const field = document.querySelector('[aria-label={json.dumps(label)}]');"
        f"field.value = {json.dumps(value)};"
        "field.dispatchEvent(new Event(field.tagName === 'SELECT' ? 'change' : 'input', {bubbles: true})); })()"
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_page_from_file(browser: Browser, address: str, size: tuple[int, int], dark: bool) -> None:
    """It fits, draws every plot, complains of nothing and asks nobody for anything."""
    browser.resize(*size, dark=dark)
    browser.open(address)
    assert browser.run("document.documentElement.scrollWidth") <= size[0]
    assert browser.run("document.querySelectorAll('#charts .uplot canvas').length") >= 7
    assert browser.run("document.querySelectorAll('#training-charts .uplot canvas').length") >= 1
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark
    assert "The reward grows with length" in text_of(browser, "[data-topic=length] .answer")
    top = browser.run("document.querySelector('[data-topic=length]').getBoundingClientRect().top")
    assert top < size[1], "the answer about length is not on the first screen"
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith(("file:", "data:", "about:"))] == []


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_largest_margin(browser: Browser, address: str, made: HandmadeRun, size: tuple[int, int]) -> None:
    """One click leads to the pair with the largest margin, and says why it is one."""
    browser.resize(*size)
    browser.open(address)
    browser.run("document.getElementById('largest-margin').click()")
    browser.wait("document.querySelectorAll('.detail article.answer').length")
    pairs = [
        pair for iteration in (1, 2) for pair in Artifact.open(made.path / f"iteration-00{iteration}/pairs").rows(Pair)
    ]
    best = max(pairs, key=lambda pair: pair.margin)
    why = text_of(browser, ".detail .why")
    assert f"margin {best.margin:g}" in why
    assert "the highest of 3) was chosen over answer" in why
    assert browser.run("document.querySelectorAll('.detail > article').length") == 3
    assert float(text_of(browser, ".detail > article.chosen .score b")) == best.chosen_score
    top = browser.run("document.querySelector('.detail .why').getBoundingClientRect().bottom")
    assert 0 <= top < size[1], "what was asked for is not in sight"


def test_texts_are_shown_and_not_executed(browser: Browser, address: str) -> None:
    """Markup, escape sequences and changes of direction of a model are texts."""
    browser.resize(*DESK)
    browser.open(address)
    browser.run("document.querySelector('.prompts a').click()")
    shown = browser.wait("document.querySelector('.detail article.answer .answer-text')?.innerText")
    assert '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=2">' in shown
    assert "⟨001B⟩[31m⟨202E⟩abc⟨0007⟩" in shown
    assert "[bold]" in browser.run("document.querySelector('.prompts a').innerText")
    told = text_of(browser, ".detail article.answer .scorer-details")
    assert told.startswith(("reward half\n0.5", "reward half\n\n0.5")), told
    assert "reward why" in told
    assert 'onerror="window.hacked=2">⟨001B⟩[31m⟨202E⟩abc⟨0007⟩ because' in told
    assert browser.run("typeof window.hacked") == "undefined"
    assert browser.run("document.querySelectorAll('.detail img, .detail script').length") == 0
    assert browser.complaints() == []


def test_token_log_probs(browser: Browser, address: str) -> None:
    """Every token of an answer, with its log-probability."""
    browser.resize(*DESK)
    browser.open(address)
    browser.run("document.querySelector('.prompts a').click()")
    browser.wait("document.querySelectorAll('.detail article.answer button').length")
    browser.run("document.querySelector('.detail article.answer button').click()")
    tokens = browser.wait("document.querySelectorAll('.detail .token').length")
    assert f"{tokens} tokens" in text_of(browser, ".detail article.answer .head")
    assert "log-probability -0.50" in browser.run("document.querySelector('.detail .token').title")
    assert f"sum {-0.5 * tokens:.2f} nats" in text_of(browser, ".detail article.answer")


def test_same_prompt_over_iterations(browser: Browser, address: str) -> None:
    """The best answers of all iterations, each as a difference to the one before."""
    browser.resize(*DESK)
    browser.open(address)
    choose(browser, "Answers of", "iteration-002/heldout/generation")
    browser.wait("document.querySelectorAll('.prompts a').length === 2")
    browser.run("document.querySelector('.prompts a').click()")
    browser.wait("document.querySelectorAll('.history article').length === 3")
    assert browser.run("document.querySelector('.history article:nth-of-type(2) ins').innerText.trim()") == "word word"
    assert browser.run("document.querySelectorAll('.history article del').length") == 0
    assert browser.run(
        "[...document.querySelectorAll('.prompts small')].every((one) => /change \\+2/.test(one.innerText))"
    )


def test_filters_orders_and_search(browser: Browser, address: str, made: HandmadeRun) -> None:
    """What is listed is what was asked for."""
    browser.resize(*DESK)
    browser.open(address)
    listed = "document.querySelectorAll('.prompts li').length"
    note = "document.querySelector('#browser [role=status]').innerText"
    total = browser.run(listed)
    assert total == Artifact.open(made.path / "iteration-002/generation").manifest.rows
    choose(browser, "search texts", "WHAT IS 1 AND")
    browser.wait(f"{note} === '1 of {total} prompts.'")
    choose(browser, "search texts", "no such words")
    browser.wait(f"{note} === '0 of {total} prompts.'")
    choose(browser, "search texts", "")
    browser.wait(f"{listed} === {total}")
    choose(browser, "score from", "1000")
    browser.wait(f"{listed} === 0")
    choose(browser, "score from", "")
    choose(browser, "Finish reason", "stop")
    browser.wait(f"{listed} === 0")  # the first answer of each was cut off
    choose(browser, "Finish reason", "length")
    browser.wait(f"{listed} === {total}")
    choose(browser, "Order", "file")
    rows = [row.messages[0].content for row in Artifact.open(made.path / "iteration-002/generation").rows(Rollout)]
    first = "document.querySelector('.prompts .model-text').innerText"
    browser.wait(f"{first} === {json.dumps(rows[0])}")


def test_link_to_a_sample(browser: Browser, address: str, made: HandmadeRun) -> None:
    """The address of a sample opens it; that of one which is not there says so."""
    browser.resize(*PHONE)
    row = next(Artifact.open(made.path / "iteration-001/generation").rows(Rollout))
    browser.open(f"{address}#sample=iteration-001%2Fgeneration;{row.prompt_id};2")
    assert browser.wait("document.querySelector('.detail article.marked .head a')?.innerText") == "answer 2"
    browser.run("location.hash = '#sample=iteration-001%2Fgeneration;nothing'")
    browser.wait("document.querySelector('.detail').innerText.includes('does not have the sample')")
    browser.run("location.hash = '#sample=%E0;x'")
    browser.run("new Promise((resolve) => setTimeout(resolve, 50))")
    assert browser.complaints() == []


def test_samples_beside_the_page(
    browser: Browser, made: HandmadeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit into the page is read from the folder beside it, also from a file; without it that is said."""
    monkeypatch.setattr(page, "PAGE_BYTES", 0)
    others = write_report(*open_run(made.path), tmp_path / "page.html")
    assert others
    browser.resize(*DESK)
    browser.open((tmp_path / "page.html").as_uri())
    browser.run("document.querySelector('.prompts a').click()")
    browser.wait("document.querySelectorAll('.detail article.answer').length >= 3")
    assert browser.complaints() == []
    (tmp_path / "page.samples").rename(tmp_path / "elsewhere")
    browser.open((tmp_path / "page.html").as_uri())
    browser.run("document.querySelector('.prompts a').click()")
    browser.wait("document.querySelector('.detail').innerText.includes('copy the folder as well')")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[RunDirectory, str]]:
    """A run that `pipeline view` serves, and the address."""
    made = ReportedRun(tmp_path).build()
    run = RunDirectory.existing(made.path)
    live = LiveReport(lambda: (run, build_graph(run.config, run.iterations)))
    server = make_server(live, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield run, f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()
    thread.join()


def test_view_is_renewed(browser: Browser, served: tuple[RunDirectory, str]) -> None:
    """What happens in the run shows by itself, and leaves what the reader does alone."""
    run, address = served
    browser.resize(*DESK)
    browser.open(address)
    choose(browser, "search texts", "what is 2")
    browser.run("document.querySelector('.prompts a').click()")
    browser.wait("document.querySelectorAll('.detail article.answer').length")
    shown = text_of(browser, ".detail")
    manifest = run.path / "iteration-002/evaluation/manifest.json"
    manifest.rename(manifest.with_name("kept"))
    run.record(StageWaits(stage="iteration-002/evaluation", text="for a machine"))
    browser.wait("document.querySelector('.state').innerText.includes('2 of 3 policies')", 20)
    assert "iteration-002/evaluation" in text_of(browser, "#missing")
    assert browser.run("document.querySelector('[type=search]').value") == "what is 2"
    assert text_of(browser, ".detail") == shown
    assert browser.complaints() == []
