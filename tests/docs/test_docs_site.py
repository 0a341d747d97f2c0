"""The documentation site: what is generated is current, the build finds mistakes, and pages work from files alone."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, NoBrowser
from missing_tools import skip_or_fail

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LOADED = re.compile(r"<(?:script|img|iframe|link(?![^>]*canonical))[^>]+(?:src|href)=\"?https?://[^>]+>")
"""What a page would load from another host."""
FOCUS = """
(() => {
  const open = document.activeElement.shadowRoot?.activeElement?.matches('input');
  if (!open) document.querySelector('.md-search__button').click();
  return open;
})()
"""
FOUND = "document.activeElement.shadowRoot.textContent"


def lay_out(root: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(root / "scripts/docs/pages.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository whose documentation can be edited."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ("docs", "scripts", ".git", ".venv", "build"):
            (folder / path.name).symlink_to(path)
    for name in ("docs", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def test_what_is_generated_from_the_code_is_current() -> None:
    command = [sys.executable, str(ROOT / "scripts/docs/references.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_page_that_is_out_of_date_or_unknown_is_told(copy: Path) -> None:
    page = copy / "docs/reference/configuration.md"
    page.write_text(page.read_text().replace("| `seed` |", "| `sead` |"))
    (copy / "docs/schemas/old.json").write_text("{}")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import references as r; print(r.main()); sys.argv.pop(); r.main()"
    )
    command = [sys.executable, "-c", code, str(copy / "scripts/docs"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    checked, _, written = result.stdout.partition("1\n")
    told = [line.split(" is out of date")[0] for line in checked.splitlines()]
    assert told == written.splitlines() == ["docs/reference/configuration.md", "docs/schemas/old.json"]
    assert page.read_text() == (ROOT / "docs/reference/configuration.md").read_text()
    assert not (copy / "docs/schemas/old.json").exists()


def test_pages_and_navigation_have_the_same_files(tmp_path: Path) -> None:
    result = lay_out(ROOT, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "source/pipelines/iteration.py.md" in (tmp_path / "pages/stages.md").read_text()
    assert "class Recipe" in (tmp_path / "pages/source/pipelines/iteration.py.md").read_text()


def test_the_build_stops_at_dead_links_and_forgotten_pages(copy: Path, tmp_path: Path) -> None:
    (copy / "docs/forgotten.md").write_text("# Forgotten\n\nSee [it](nowhere.md).\n")
    (copy / "docs/glossary.md").unlink()
    result = lay_out(copy, tmp_path / "site")
    assert result.returncode == 1
    assert "docs/forgotten.md links to nowhere.md, which is not a file of the repository" in result.stderr
    assert "forgotten.md is not in the navigation: add it to nav in docs/zensical.toml" in result.stderr
    assert "docs/zensical.toml names glossary.md, which is not a page" in result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lists_and_tables_are_read_alike_by_repositories_and_the_site(page: Path) -> None:
    """Python-Markdown wants four spaces where CommonMark is content with two, and CommonMark a blank line."""
    in_code, before, wrong = False, "", []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        in_code ^= line.lstrip().startswith("```")
        continues = not before and re.match(" {1,3}[^ ]", line)
        begins_table = line.startswith("|") and before and not before.startswith("|")
        if not in_code and (continues or begins_table):
            wrong.append(f"line {number}: {line}")
        before = line
    assert wrong == []


def test_schemas_say_every_field_in_words() -> None:
    schema = json.loads((ROOT / "docs/schemas/metrics.json").read_text())
    point = schema["$defs"]["Point"]
    assert set(point["required"]) == {"point", "time", "stage", "key", "unit", "number", "iteration", "global_step",
                                      "metrics"}  # fmt: skip
    assert point["properties"]["iteration"]["description"] == "Number of the iteration; 0 for stages before the first."
    events = json.loads((ROOT / "docs/schemas/events.json").read_text())
    assert events["discriminator"]["mapping"]["published"] == "#/$defs/StagePublished"


@pytest.fixture
def browser() -> Iterator[Browser]:
    try:
        found = Browser()
    except NoBrowser as missing:
        skip_or_fail(f"NO PAGE IS TESTED: {missing}")
    yield found
    found.close()


@pytest.mark.slow
def test_the_site_works_without_a_server_or_a_network(tmp_path: Path, browser: Browser) -> None:
    built = subprocess.run(
        ["bash", "scripts/docs.sh", str(tmp_path / "docs")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    site = tmp_path / "docs/site"
    assert {path.name: found for path in site.rglob("*.html") if (found := LOADED.findall(path.read_text()))} == {}
    for page in ("index.html", "reference/configuration.html", "troubleshooting.html"):
        browser.call("Page.navigate", url=(site / page).as_uri())
        browser.wait(f"document.readyState === 'complete' && location.href.endsWith('{page}')")
        browser.wait(FOCUS)
        browser.call("Input.insertText", text="preemption signal")
        browser.wait(f"{FOUND}.includes('results') && {FOUND}.includes('what a scheduler sends')")
        assert browser.complaints() == []
    assert [address for address in browser.requests() if not address.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("training-dpo-cpu", "dpo_vs_trl_long_prompt"),
        ("training-dpo-cpu", "dpo_vs_trl_short_prompt"),
        ("training-ppo-cpu", "ppo_vs_trl"),
    ],
)
def test_figures_of_the_comparison_are_those_that_were_measured(file: str, name: str) -> None:
    text = (ROOT / "docs/comparison.md").read_text()
    found = json.loads((ROOT / f"benchmarks/results/{file}.json").read_text())
    result = found["result"]["comparisons"][name]
    low, high = result["range"]
    assert f"| {result['ratio']:.2f} | {low:.2f} to {high:.2f} |" in text
    assert found["command"] in text
