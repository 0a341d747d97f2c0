"""Renders the report as one self-contained HTML page: styles, scripts and data are in it."""

import hashlib
import zlib
from base64 import b64encode
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import msgspec

from pipelines.insight.report.data import GroupColumns, RunReport, SampleSet
from pipelines.insight.report.expected import expected_table
from pipelines.insight.report.length import HELD_OUT
from pipelines.insight.report.sample_cache import SampleCache, chunk_names
from pipelines.insight.report.samples import LEVEL
from pipelines.insight.report.statements import duration
from pipelines.insight.report.tables import (
    evaluation_table,
    funnels,
    gantt,
    judge_costs_table,
    own_evaluations_table,
    provenance,
    rounded,
    running_stages,
    visible,
)

if TYPE_CHECKING:
    import jinja2

PAGE_BYTES = 4_600_000
"""Size of a page with its samples; chunks that do not fit are files next to it."""
MAX_GROUPS = 50_000
"""Prompts that the browser of samples can sort and filter, over all sets."""
UPLOT = "report/vendor/uPlot-1.6.32.iife.min.js"
DOM = "report/assets/dom.js"
PLOT = "report/assets/plot.js"
SCRIPTS = (
    UPLOT,
    "report/vendor/diff-9.0.0.min.js",
    DOM,
    "report/assets/samples.js",
    PLOT,
    "report/assets/curves.js",
    "report/assets/browser.js",
    "report/assets/answers.js",
    "report/assets/main.js",
)
STYLES = ("report/vendor/uPlot-1.6.32.min.css", "report/assets/report.css")


def render_page(
    report: RunReport, cache: SampleCache, folder: str | None, *, live: int | None = None
) -> tuple[str, list[str]]:
    """The page as HTML, and the names of the chunks that are not in it.

    Args:
        folder: the folder of the chunks that do not fit, relative to the page; None: there is none.
        live: version number, for a page that polls its server for later ones; it contains no samples.
    """
    sets = _shown(report.sets)
    data = _data(report, sets, folder, live)
    scripts = [read_asset(name) for name in SCRIPTS]
    styles = [read_asset(name) for name in STYLES]
    size = len(data) + sum(map(len, scripts)) + sum(map(len, styles)) + 200_000
    inside = [] if live is not None else _chunks_that_fit(sets, PAGE_BYTES - size)
    others = [name for found in sets for name in chunk_names(found) if name not in set(inside)]
    text = (
        environment()
        .get_template("report/assets/report.html.j2")
        .render(
            report=report,
            data=data,
            chunks=[(name, cache.chunk(name)) for name in inside],
            scripts=scripts,
            styles=styles,
            hashes=" ".join(f"'sha256-{script_hash(script)}'" for script in scripts),
            evaluations=evaluation_table(report),
            funnels=funnels(report),
            gantt=gantt(report),
            provenance=provenance(report),
            now=running_stages(report),
            own=own_evaluations_table(report),
            paid=judge_costs_table(report),
            expected=expected_table(report),
        )
    )
    return text, others


def _shown(sets: list[SampleSet]) -> list[SampleSet]:
    """The sets, without the samples beyond `MAX_GROUPS`, and without points that are not drawn."""
    kept: set[str] = set()
    room = MAX_GROUPS
    for found in sorted(sets, key=_interest_rank):
        room -= len(found.columns.prompt)
        if room >= 0:
            kept.add(found.key)
    without: dict[str, Any] = {"columns": GroupColumns(), "excerpts": {}, "chunks": [], "bytes": [], "token_bytes": []}
    heldout = [one.key for one in sets if one.role == HELD_OUT]
    drawn = {*heldout[:1], *heldout[-1:], *(one.key for one in sets[-1:])}
    return [
        msgspec.structs.replace(
            found,
            largest=None,
            points=found.points if found.key in drawn else [],
            **({} if found.key in kept else {**without, "left_out": found.prompts}),
        )
        for found in sets
    ]


def _data(report: RunReport, sets: list[SampleSet], folder: str | None, live: int | None) -> str:
    """The data for the scripts: base64 of deflated JSON."""
    prompts: dict[str, list[Any]] = {}
    for found in sets:
        prompts |= found.excerpts
    parts = msgspec.structs.asdict(report)
    for name in ("config", "config_of", "notes", "missing", "statements", "ledgers", "stages", "largest", "expected"):
        parts.pop(name)
    data = msgspec.to_builtins(parts | {"sets": sets})
    for found in data["sets"]:
        found.pop("excerpts")
    data |= {"prompts": prompts, "folder": folder, "live": live}
    return b64encode(zlib.compress(msgspec.json.encode(data), LEVEL)).decode()


def _chunks_that_fit(sets: list[SampleSet], room: int) -> list[str]:
    """The chunks that fit into `room` bytes of the page: all texts before any log-probabilities."""
    found: list[str] = []
    ordered = sorted(sets, key=_interest_rank)
    for sizes, kind in (("bytes", ""), ("token_bytes", "t")):
        for one in ordered:
            for number, size in enumerate(getattr(one, sizes)):
                if size <= room:
                    room -= size
                    found.append(f"{one.key}-{number}{kind}")
    return found


def _interest_rank(found: SampleSet) -> tuple[int, int]:
    """Sort key by interest to a reader: held-out prompts first, the setup last; later iterations before earlier."""
    return (found.role != HELD_OUT if found.iteration is not None else 2), -(found.iteration or 0)


@cache
def read_asset(name: str) -> str:
    """The text of a script, style sheet or template."""
    return (files("pipelines.insight") / name).read_text("utf-8")


def script_hash(script: str) -> str:
    """The hash of a script for a page's content security policy."""
    return b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def environment() -> "jinja2.Environment":
    """The environment of the pages' templates, which escapes all values."""
    import jinja2  # imported for the first page only

    loader = jinja2.FunctionLoader(read_asset)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "visible": visible, "rounded": rounded}
    environment.undefined = jinja2.StrictUndefined
    return environment
