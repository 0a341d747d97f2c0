"""Renders the statements and tables of a report as Markdown."""

import re

from pipelines.insight.report.data import LargestMargin, RunReport, StageRow
from pipelines.insight.report.expected import expected_table
from pipelines.insight.report.statements import duration
from pipelines.insight.report.tables import (
    NONE,
    evaluation_table,
    funnels,
    judge_costs_table,
    own_evaluations_table,
    provenance,
    rounded,
    visible,
)

_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~&])")
MAX_STAGES = 400


def render_markdown(report: RunReport) -> str:
    """The report as Markdown."""
    parts = [
        f"# {escaped(report.name)}",
        f"{report.state.capitalize()}; {len(report.evaluations)} of {report.iterations + 1} policies evaluated.",
    ]
    for statement in report.statements:
        parts.append(f"## {statement.question}")
        parts.append(f"**{escaped(statement.answer)}**")
        parts.append("\n".join(f"- {escaped(line)}" for line in statement.details))
    if report.largest is not None:
        parts += ["## The pair with the largest margin", *_largest(report.largest)]
    if report.missing:
        parts.append("## What is missing")
        parts.append("\n".join(f"- {escaped(line)}" for line in report.missing))
    titles, rows = evaluation_table(report)
    if rows:
        parts += ["## Held-out prompts, by iteration", table(titles, rows)]
    own = own_evaluations_table(report)
    if own[1]:
        parts += ["## Your own evaluations", table([escaped(title) for title in own[0]], own[1])]
    if report.paid:
        parts += ["## What judges have cost", table(*judge_costs_table(report))]
    parts += _training_data(report)
    for stage, bins in report.calibration.items():
        rows = [
            [rounded(one.get(name)) for name in ("confidence", "accuracy", "count")] for one in bins if one.get("count")
        ]
        parts += [f"## Calibration of {escaped(stage)}", table(["confidence", "accuracy", "held-out pairs"], rows)]
    parts += ["## What was kept and dropped", *_dropped(report)]
    parts += ["## Time", table(["stages", "time"], [[r, duration(s)] for r, s in report.time.by_role.items()])]
    expected = expected_table(report)
    if expected[1]:
        parts += ["## Expected by the plan, and measured", table(*expected)]
    parts += ["## Provenance", *_provenance(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _largest(pair: LargestMargin) -> list[str]:
    rows = [["prompt", "", pair.prompt], ["chosen", rounded(pair.chosen_score), pair.chosen]]
    rows.append(["rejected", rounded(pair.rejected_score), pair.rejected])
    return [f"Margin {rounded(pair.margin)}, of {escaped(pair.stage)}.", table(["", "score", "text"], rows)]


def _training_data(report: RunReport) -> list[str]:
    rows = [
        [
            str(one.iteration), str(one.prompts), str(one.samples),
            rounded(one.mean_length), rounded(one.correlation.within),
            rounded(100 * one.groups_with_gradient / one.groups_scored if one.groups_scored else None),
            rounded(100 * one.truncated / one.samples if one.samples else None),
            *(rounded(getattr(one.pairs, name, None)) for name in ("margin", "chosen_length", "rejected_length")),
            rounded(one.gap),
        ]
        for one in report.sets
        if one.role == "generation" and one.iteration is not None
    ]  # fmt: skip
    titles = [
        "iteration", "prompts", "samples", "length", "reward and length", "% with gradient", "% cut off", "margin",
        "chosen length", "rejected length", "engine - trainer (nats)",
    ]  # fmt: skip
    return ["## Answers that were trained on", table(titles, rows)] if rows else []


def _dropped(report: RunReport) -> list[str]:
    rows = []
    for funnel in funnels(report):
        for line in funnel["lines"]:
            lost = ", ".join(f"{count} {name}" for name, count, _ in line["parts"][1:])
            rows.append(
                [funnel["title"], line["role"], f"{line['kept']} of {line['rows_in']} {line['unit']}", lost or NONE]
            )
    return [table(["", "stage", "kept", "dropped"], rows)] if rows else ["Nothing is published yet."]


def _provenance(report: RunReport) -> list[str]:
    found = provenance(report)
    stages = [_stage(row) for row in report.stages[:MAX_STAGES]]
    return [
        f"Seed {found['seeds']['seed']}, date {found['seeds']['date']}; report made {found['made']}.",
        table(["package", "version"], [[name, version] for name, version in found["versions"].items()]),
        table(["stage", "state", "key", "digest"], stages),
        "\n".join(["```yaml", *visible(report.config).replace("```", "'''").splitlines(), "```"]),
    ]


def _stage(row: StageRow) -> list[str]:
    return [row.name, row.state, (row.key or NONE)[:12], (row.digest or NONE)[:12]]


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, with its cells escaped."""
    if not rows:
        return ""
    lines = [titles, ["---"] * len(titles), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """A text escaped for Markdown, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(visible(text).split()))
