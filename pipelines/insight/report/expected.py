"""Compares the measured durations of stages with those that the plan expected."""

import shlex
import statistics
from collections.abc import Sequence

from pipelines.config.run import RunConfig
from pipelines.insight.report.data import ExpectedLine, RunReport, StageRow, Statement
from pipelines.planning.search.plan_file import digest_of

DRIFT_ERRORS = 2.0
"""Multiple of the stated error (one standard deviation) beyond which durations count as drifted."""
MAX_NAMED = 3
BASES = {
    "measured": "runs of similar stages",
    "scaled": "runs of other sizes or layouts",
    "analytic": "data sheets alone",
}


def expected_lines(config: RunConfig, rows: Sequence[StageRow]) -> list[ExpectedLine]:
    """Expected and measured durations by role, over the stages that this run has computed itself in one attempt."""
    expectation = config.placement.expectation
    if expectation is None:
        return []
    found = []
    for role, expected in expectation.stages.items():
        own = [row for row in rows if row.role == role and row.total is not None and row.wait is not None]
        own = [row for row in own if row.attempts == 1]  # a stage with retries says nothing about the prediction
        if not own:
            continue
        predicted = [expected.seconds_of(row.iteration) for row in own]
        measured = [(row.total or 0.0) + (row.wait or 0.0) for row in own]
        found.append(
            ExpectedLine(
                role=role,
                stages=len(own),
                predicted=statistics.fmean(predicted),
                measured=statistics.fmean(measured),
                error=expected.error,
                basis=expected.basis,
                iterations=[row.iteration for row in own],
                ratios=[a / b if b else 0.0 for a, b in zip(measured, predicted, strict=True)],
            )
        )
    return found


def has_drifted(line: ExpectedLine) -> bool:
    """Whether the mean duration differs from the plan's expectation by more than twice the stated error."""
    return abs(line.measured / line.predicted - 1) > DRIFT_ERRORS * line.error if line.predicted else False


def plan_statement(report: RunReport, config: RunConfig) -> list[Statement]:
    """The statement on whether the plan's expectations held; an empty list without a plan that has any."""
    expectation = config.placement.expectation
    lines = report.expected
    if expectation is None:
        return []
    found = Statement(topic="plan", question="Did the plan hold?", answer="", tone="good")
    if not lines:
        found.answer, found.tone = "Not known: no stage that the plan expects is published yet.", "unclear"
        return [found]
    drifted = sorted(
        (line for line in lines if has_drifted(line)), key=lambda line: -abs(line.measured - line.predicted)
    )
    whole = sum(line.measured * line.stages for line in lines) / sum(line.predicted * line.stages for line in lines)
    has_changed = expectation.config != digest_of(config)
    overall = f"Its stages took {whole:.2g}x of what it expected"
    if not drifted:
        changed = "Yes, although the run's config has changed since it was made." if has_changed else "Yes."
        found.answer = f"{changed} {overall}, none beyond twice its stated error."
    else:
        found.tone = "unclear"
        found.answer = f"Not all of it. {_drift_sentence(drifted[0])}"
        found.details = [_drift_sentence(line) for line in drifted[1:MAX_NAMED]]
        found.details.append(f"{overall}.")
        found.details.append(f"Search again, by what the stages have taken: {_command(report)}")
        if has_changed:
            found.details.append("The run's config has changed since the plan was made, which may be why.")
    return [found]


def _drift_sentence(line: ExpectedLine) -> str:
    worst = max(range(len(line.ratios)), key=lambda number: abs(line.ratios[number] - 1))
    iteration = line.iterations[worst]
    which = f"Iteration {iteration}'s {line.role}" if iteration is not None else line.role
    return (
        f"{which} took {line.ratios[worst]:.2g}x of what the plan expected with ± {line.error:.0%}, "
        f"{line.measured / line.predicted:.2g}x on average; the plan knew it by {BASES[line.basis]}."
    )


def _command(report: RunReport) -> str:
    return f"pipeline plan search CONFIG --runs {shlex.quote(report.path)}"


def expected_table(report: RunReport) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the table of expected and measured durations by role."""
    rows = [
        [
            line.role,
            str(line.stages),
            f"{line.predicted:.3g} s ± {line.error:.0%}",
            f"{line.measured:.3g} s",
            f"{line.measured / line.predicted:.2f}" if line.predicted else "",
            line.basis + (", drifted" if has_drifted(line) else ""),
        ]
        for line in report.expected
    ]
    return ["stages", "how many", "expected, each", "measured", "ratio", "known by"], rows
