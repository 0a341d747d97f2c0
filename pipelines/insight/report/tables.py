"""Computes the tables that the page and the Markdown share."""

import re
import time
from typing import Any

from pipelines.insight.report.data import RunReport, StageRow
from pipelines.run.metrics import COLUMNS, is_further_scorer
from pipelines.text import format_ranges

GAP_SECONDS = 30.0
"""Duration up to which gaps without a running stage are not shortened."""
MAX_BARS = 150
"""Maximum number of stages in the chart of times: the latest."""
MAX_FUNNELS = 12
"""Maximum number of iterations whose ledgers are shown: the latest, and those with the largest dropped shares."""
MAX_STAGES = 600
NONE = "\u2013"
"""Placeholder for a value that is not known."""
BEFORE = "Before the first iteration, where something was dropped"
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def visible(text: Any) -> str:
    """A text with control characters, changes of direction and surrogates replaced by their codes."""
    return _UNSEEN.sub(lambda match: f"\u27e8{ord(match[0]):04X}\u27e9", str(text))


def rounded(value: Any) -> str:
    """A number as text for a table; other values as they are, None as `NONE`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NONE if value is None else str(value)
    return (
        str(value) if isinstance(value, int) else f"{value:.3f}" if abs(value) >= 0.001 or not value else f"{value:.1e}"
    )


def evaluation_table(report: RunReport) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the metrics by iteration."""
    if not report.evaluations:
        return [], []
    first = report.evaluations[0]
    names = {
        name: title for name, title in COLUMNS.items() if any(row.get(name) is not None for row in report.evaluations)
    }
    names |= {name: name.removesuffix("_mean").replace("_", " ") for name in first if is_further_scorer(name)}
    rows = [[str(row["iteration"]), *(rounded(row.get(name)) for name in names)] for row in report.evaluations]
    return ["iteration", *names.values()], rows


def own_evaluations_table(report: RunReport) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the user's own evaluations by iteration."""
    names = dict.fromkeys(name for row in report.own_evaluations for name in row)
    rows = [[rounded(row.get(name)) for name in names] for row in report.own_evaluations]
    return list(names), rows


def judge_costs_table(report: RunReport) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the costs of judges, in the currency of their prices."""
    rows = [
        [
            line.scorer,
            f"{line.stages:,}",
            f"{line.answers:,}",
            f"{line.prompt_tokens:,}",
            f"{line.completion_tokens:,}",
            NONE if line.cost is None else f"{line.cost:.6g}",
        ]
        for line in report.paid
    ]
    return ["judge", "stages", "answers", "tokens of questions", "tokens of answers", "cost"], rows


def running_stages(report: RunReport) -> list[str]:
    """The running stages with their progress; empty unless the run is in progress."""
    if report.state not in ("running", "under way"):
        return []
    return [f"{row.name} {row.detail}".strip() for row in report.stages if row.state == "begun"]


def funnels(report: RunReport) -> list[dict[str, Any]]:
    """The funnel of each iteration, and of the stages before the first: the ledgers of its stages."""
    groups: dict[int | None, list[dict[str, Any]]] = {}
    for line in report.ledgers:
        if not line.rows_in or (line.iteration is None and not line.dropped):
            continue
        parts = [("kept", line.kept, line.kept / line.rows_in)]
        parts += [(reason.replace("_", " "), count, count / line.rows_in) for reason, count in line.dropped.items()]
        groups.setdefault(line.iteration, []).append(
            {"role": line.role, "unit": line.unit, "rows_in": line.rows_in, "kept": line.kept, "parts": parts}
        )
    shares = {
        iteration: max(1 - line["kept"] / line["rows_in"] for line in lines) for iteration, lines in groups.items()
    }
    worst = sorted(groups, key=lambda iteration: -shares[iteration])[: MAX_FUNNELS // 2]
    wanted = {None, *worst, *sorted(filter(None, groups))[-MAX_FUNNELS // 2 :]}
    if len(groups) <= MAX_FUNNELS:
        wanted |= set(groups)
    return [
        {
            "title": BEFORE if iteration is None else f"Iteration {iteration}",
            "lines": lines,
            "dropped": any(len(line["parts"]) > 1 for line in lines),
        }
        for iteration, lines in sorted(groups.items(), key=lambda item: -1 if item[0] is None else item[0])
        if iteration in wanted
    ]


def gantt(report: RunReport) -> dict[str, Any]:
    """The chart of times: a bar for each stage, placed in percent of the time from the first to the last one.

    Gaps in which no stage ran (in a run that was continued the next day) are shortened to a fiftieth of the rest.
    """
    rows = [row for row in report.stages if row.begun is not None and row.wait is not None]
    rows = sorted(rows, key=lambda row: row.begun or 0.0)[-MAX_BARS:]
    if not rows:
        return {"bars": [], "ticks": [], "left_out": 0, "shortened": False}
    spans = [(row.begun or 0.0, max(row.begun or 0.0, row.ended or 0.0)) for row in rows]
    gaps = _idle(spans)
    begin, end = spans[0][0], max(until for _, until in spans)
    worked = max(1e-3, end - begin - sum(until - since for since, until in gaps))
    gaps = [(since, until) for since, until in gaps if until - since > max(GAP_SECONDS, worked / 10)]

    def place(time: float) -> float:
        """Seconds from the left edge, with each gap shortened to a fiftieth of the time in which stages ran."""
        cut = (min(time, until) - since - worked / 50 * (time >= until) for since, until in gaps if time > since)
        return time - begin - sum(cut)

    span = max(1e-3, place(end))
    bars = [
        {"name": row.name, "where": _where(row), "left": 100 * place(since) / span, **_parts(row, span)}
        for row, (since, _) in zip(rows, spans, strict=True)
    ]
    ticks = [{"left": 25 * number, "seconds": span * number / 4} for number in range(5)] if not gaps else []
    made = sum(row.wait is not None for row in report.stages)
    return {"bars": bars, "ticks": ticks, "left_out": made - len(rows), "shortened": bool(gaps)}


def _idle(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The gaps between spans (start, end) that are sorted by start."""
    found, last = [], spans[0][1]
    for since, until in spans:
        if since > last:
            found.append((last, since))
        last = max(last, until)
    return found


def _where(row: StageRow) -> str:
    """The pool and the exclusive devices of a stage, in words."""
    return f"{row.pool} {format_ranges(row.given)}".strip() if row.given else row.pool


def _parts(row: StageRow, span: float) -> dict[str, Any]:
    found = [(name, getattr(row, name) or 0.0) for name in ("wait", "load", "compute", "other")]
    width = sum(seconds for _, seconds in found)
    return {
        "parts": [(name, seconds, 100 * seconds / span) for name, seconds in found if seconds > 0],
        "seconds": width,
        "width": 100 * width / span,
    }


def provenance(report: RunReport) -> dict[str, Any]:
    """Versions, hosts, seeds and the report's time, for the section on provenance."""
    versions: dict[str, dict[str, None]] = {}
    for row in report.stages:
        for name, version in row.versions.items():
            versions.setdefault(name, {})[version] = None
    hosts = sorted({str(row.hardware.get("host")) for row in report.stages if row.hardware.get("host")})
    seeds = {"seed": report.config_of.get("seed"), "date": report.config_of.get("date")}
    return {
        "versions": {name: ", ".join(found) for name, found in sorted(versions.items())},
        "most": MAX_STAGES,
        "hosts": hosts,
        "seeds": seeds,
        "made": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(report.made)),
    }
