"""`pipeline doctor CONFIG [key=value ...]`: what would stop a run after hours, found in seconds before it starts.

Every check looks at one thing and says what it found, and how to fix what is wrong. All of them run, whatever the
others find. Nothing is written but into directories that are removed again, and nothing is downloaded.
"""

import concurrent.futures
from collections.abc import Callable, Iterator

import msgspec
from rich.console import Console
from rich.text import Text

from contracts import stopping
from contracts.errors import UserError
from contracts.preflight import heard
from contracts.secrets import TOKEN
from pipelines.doctor.checks import (
    check_cluster,
    check_configuration,
    check_devices,
    check_disk,
    check_environments,
    check_memory,
    check_models,
    check_processors,
    check_tokens,
    most_processes,
    needs_loopback,
)
from pipelines.doctor.machine import CheckResult, check_file_system, check_limits, check_loopback
from pipelines.environments.paths import home
from pipelines.run.plan import Plan, plan_run
from pipelines.text import plural, say


def doctor(console: Console, source: str, overrides: list[str], iterations: int | None, *, as_json: bool) -> int:
    """Print what the checks find; 0, or 2 where one of them found an error."""
    stopping.listen()  # so that what the checks have put into directories is removed whatever ends this
    findings = examine(make_plan(source, overrides, iterations))
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(findings), indent=1).decode())
    else:
        print_findings(console, findings)
    return UserError.exit_code if any(finding.level == "error" for finding in findings) else 0


def make_plan(source: str, overrides: list[str], iterations: int | None) -> Plan:
    """Read a run's configuration as `pipeline run` does, but without downloading anything.

    Raises:
        UserError: it is wrong; the message repeats no access token.
    """
    try:
        return plan_run(source, overrides, iterations, download=False)
    except UserError as error:
        raise UserError(TOKEN.sub("(hidden)", str(error))) from None


def examine(plan: Plan) -> list[CheckResult]:
    """The findings of all checks, in their order; the slow ones run side by side."""
    here: list[tuple[str, Callable[[], Iterator[CheckResult]]]] = [
        ("devices", lambda: check_devices(plan)),
        ("processors", lambda: check_processors(plan)),
        ("memory", lambda: check_memory(plan)),
    ]
    checks: list[tuple[str, Callable[[], Iterator[CheckResult]]]] = [
        ("configuration", lambda: check_configuration(plan)),
        ("environments", lambda: check_environments(plan)),
        ("cluster", lambda: check_cluster(plan)),
        *([] if plan.config.executor.is_remote else here),
        ("models", lambda: check_models(plan)),
        ("disk", lambda: check_disk(plan)),
        ("file system", lambda: check_file_system("the run's directory", plan.config.run_directory)),
        ("file system", lambda: check_file_system("RATCHET_HOME", home())),
        ("tokens", lambda: check_tokens(plan)),
        ("network", lambda: iter([check_loopback(needs_loopback(plan))])),
        ("limits", lambda: check_limits(most_processes(plan))),
    ]
    with concurrent.futures.ThreadPoolExecutor(len(checks)) as pool:
        found = pool.map(lambda check: run_check(*check), checks)
        return [finding for findings in found for finding in findings]


def run_check(name: str, check: Callable[[], Iterator[CheckResult]]) -> list[CheckResult]:
    """What a check finds; what stops it is a finding as well."""
    findings, stopped = heard(check)
    return findings if stopped is None else [*findings, CheckResult(name, "error", stopped)]


def print_findings(console: Console, findings: list[CheckResult]) -> None:
    """One line for each finding, one below it for its fix, and a last one for all of them."""
    colours = {"ok": "green", "warning": "yellow", "error": "bold red"}
    for finding in findings:
        line = Text(f"{finding.level:<8} ", style=colours[finding.level])
        line.append(f"{finding.check}: {finding.found}", style="default")
        console.print(line, soft_wrap=True, highlight=False)
        if finding.fix:
            say(console, f"{'':<8} → {finding.fix}")
    errors, warnings = (sum(finding.level == level for finding in findings) for level in ("error", "warning"))
    verdict = "Fix the errors before `pipeline run`." if errors else "Nothing that would stop the run was found."
    say(console, f"{plural(errors, 'error')}, {plural(warnings, 'warning')}. {verdict}")
