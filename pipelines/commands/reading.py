"""Commands that read a run: runs, status, logs, report, view, compare, trace, verify."""

import argparse
import json
from functools import partial
from pathlib import Path

from contracts.errors import UserError
from contracts.files import write_atomically
from pipelines.commands.declaring import (
    JSON,
    RUN,
    argument,
    command,
    count,
    make_console,
    open_run,
)
from pipelines.insight.compare.command import as_json, print_comparison
from pipelines.insight.compare.gather import compare
from pipelines.insight.compare.page import render_comparison
from pipelines.insight.report.command import report
from pipelines.insight.report.view import PORT, view
from pipelines.insight.runs import print_runs, summaries
from pipelines.insight.status import print_status, status_data
from pipelines.insight.watch import follow_logs, print_logs
from pipelines.lineage.trace import print_trace
from pipelines.lineage.verify import print_verification
from pipelines.run.directory import RunDirectory


@command(
    "runs",
    "list runs, with their state and latest metric",
    argument("directory", nargs="?", type=Path, default=Path("runs"), help="where to look; by default ./runs"),
    JSON,
    group="read",
)
def _runs(options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(list(summaries(options.directory)), indent=1))
    else:
        print_runs(make_console(), options.directory)


@command("status", "show a run's progress and remaining time", RUN, JSON, group="read")
def _status(options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(status_data(*open_run(options.run)), indent=1))
    else:
        print_status(make_console(), *open_run(options.run))


@command(
    "logs",
    "show the log tail of a stage, or of those that are running or failed",
    RUN,
    argument("stage", nargs="?", help="a stage's name, for example iteration-001/training"),
    argument("--lines", type=count, default=30, help="lines per log"),
    argument("--part", help="of a stage of several jobs or nodes: task-0, node-1, publisher"),
    argument("--follow", action="store_true", help="follow the output until the stage or the run ends"),
    group="read",
)
def _logs(options: argparse.Namespace) -> None:
    console, (run, graph) = make_console(), open_run(options.run)
    logs = print_logs(console, run, graph, options.stage, options.lines, options.part)
    if options.follow:
        follow_logs(console, run, graph, options.stage, logs)


@command(
    "report",
    "write a run's report, a self-contained page",
    RUN,
    argument("--output", type=Path, metavar="PAGE", help="where to write the page; by default RUN/report.html"),
    argument("--markdown", action="store_true", help="print it as Markdown instead"),
    argument("--json", action="store_true", help="print its data as one JSON object instead"),
    group="read",
)
def _report(options: argparse.Namespace) -> None:
    report(*open_run(options.run), options.output, as_markdown=options.markdown, as_json=options.json)


@command(
    "view",
    "serve the report in a browser, updated during the run",
    RUN,
    argument("--port", type=int, help=f"local port; by default {PORT}, or any free one"),
    group="read",
)
def _view(options: argparse.Namespace) -> None:
    view(make_console(), partial(open_run, options.run), options.port)


@command(
    "compare",
    "compare runs: config differences, and which policy is better by how much on the same held-out prompts",
    argument("runs", nargs="+", type=Path, help="the runs' directories; each is compared with the first"),
    argument(
        "--metric",
        help="the metric to show by iteration, a name under eval/; by default the gold reward, or the reward",
    ),
    argument("--iteration", type=int, metavar="I", help="iteration to compare; by default each run's last"),
    argument("--json", action="store_true", help="print everything as one JSON object"),
    argument(
        "--html", type=Path, metavar="PAGE", help="also write it as a page, with curves and responses side by side"
    ),
    group="read",
)
def _compare(options: argparse.Namespace) -> int:
    runs, damaged = [], {}
    for path in options.runs:
        RunDirectory.existing(path)  # a path that is no run is a user's mistake
        try:
            runs.append(open_run(path))
        except UserError as error:
            damaged[path] = str(error)
    found = compare(runs, options.iteration, damaged)
    if options.html is not None:
        write_atomically(options.html, render_comparison(found).encode())
    if options.json:
        print(as_json(found))
    else:
        print_comparison(make_console(), found, options.metric)
    return 1 if found.left_out else 0


@command(
    "trace",
    "show the provenance of a checkpoint, a pair or a prompt",
    argument("what", metavar="CHECKPOINT|PAIR_ID|PROMPT_ID", help="a path in a run, an id, or a digest"),
    argument("--run", type=Path, help="the run to search; by default all below ./runs"),
    argument("--json", action="store_true", help="print one JSON object"),
    group="read",
)
def _trace(options: argparse.Namespace) -> None:
    print_trace(make_console(), options.what, options.run, as_json=options.json)


@command(
    "verify",
    "check that all artifacts are intact and consistent",
    argument("run", type=Path, help="the directory of a run, or of one artifact"),
    JSON,
    group="read",
)
def _verify(options: argparse.Namespace) -> None:
    print_verification(make_console(), options.run, as_json=options.json)
