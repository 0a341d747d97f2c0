"""`pipeline report RUN`: writes the report of a run as a page, or prints it as Markdown or JSON."""

from pathlib import Path

import msgspec

from contracts.errors import UserError
from contracts.files import write_atomically
from pipelines.graph import Graph
from pipelines.insight.report.gather import gather
from pipelines.insight.report.markdown import render_markdown
from pipelines.insight.report.page import render_page
from pipelines.insight.report.sample_cache import SampleCache
from pipelines.run.directory import RunDirectory
from pipelines.text import relative_path

PAGE = "report.html"


def report(run: RunDirectory, graph: Graph, output: Path | None, *, as_markdown: bool, as_json: bool) -> None:
    """Write the page and print its path, or print the report as Markdown or JSON.

    Raises:
        UserError: the page cannot be written there.
    """
    if as_markdown or as_json:
        found = gather(run, graph, SampleCache())
        text = (
            msgspec.json.format(msgspec.json.encode(found), indent=1).decode() + "\n"
            if as_json
            else render_markdown(found)
        )
        print(text, end="")
        return
    page = output or run.path / PAGE
    if page.is_dir() or not page.absolute().parent.is_dir():
        why = "is a directory" if page.is_dir() else "is in a directory that does not exist"
        raise UserError(f"{page} {why}. Give --output the path of a file to write, like report.html.")
    others = write_report(run, graph, page)
    note = f" (and {folder_of_page(page).name}/ next to it, with further samples)" if others else ""
    print(f"{relative_path(page.absolute())}{note}")


def write_report(run: RunDirectory, graph: Graph, page: Path) -> list[str]:
    """Write the page, and next to it a folder with what does not fit; in the run's directory, also the Markdown.

    Returns:
        The names of the chunks in the folder that the page loads.
    """
    folder = folder_of_page(page)
    cache = SampleCache(folder)
    found = gather(run, graph, cache)
    text, others = render_page(found, cache, folder.name)
    write_atomically(page, text.encode(), durable=False)
    if page == run.path / PAGE:
        write_atomically(page.with_suffix(".md"), render_markdown(found).encode(), durable=False)
    cache.prune(found.sets)
    return others


def folder_of_page(page: Path) -> Path:
    """The folder next to a page: the cache of samples, with the texts that do not fit into the page."""
    return page.absolute().with_suffix(".samples")
