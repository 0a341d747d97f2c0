"""`pipeline doctor CONFIG [key=value ...]`: finds, within seconds, problems that would stop a run after hours.

Each check examines one thing and reports what it found and how to fix problems. All checks run, regardless of the
others' findings. They write only into temporary directories, and download nothing.
"""

import concurrent.futures
import json
from collections.abc import Callable, Iterator

import msgspec
from rich.console import Console
from rich.text import Text

from contracts import stopping
from contracts.errors import UserError
from contracts.preflight import Finding, findings_of
from contracts.secrets import TOKEN
from pipelines.doctor.checks import (
    check_cluster,
    check_configuration,
    check_devices,
    check_disk,
    check_environments,
    check_hooks,
    check_hub,
    check_memory,
    check_models,
    check_processors,
    check_tokens,
    most_processes,
    needs_loopback,
)
from pipelines.doctor.machine import check_file_system, check_limits, check_loopback
from pipelines.environments.paths import home
from pipelines.run.plan import Plan, plan_run
from pipelines.text import echo, plural


def doctor(console: Console, source: str, overrides: list[str], iterations: int | None, *, as_json: bool) -> int:
    """Print the findings of all checks. Returns 2 if one of them is an error, else 0."""
    with stopping.listening():  # so that temporary directories are removed even after a signal
        findings = examine(make_plan(source, overrides, iterations))
    if as_json:
        print(json.dumps([{"check": check} | msgspec.structs.asdict(finding) for check, finding in findings], indent=1))
    else:
        print_findings(console, findings)
    return UserError.exit_code if any(finding.level == "error" for _, finding in findings) else 0


def make_plan(source: str, overrides: list[str], iterations: int | None) -> Plan:
    """Load a run's configuration as `pipeline run` does, but without downloading anything.

    Raises:
        UserError: it is wrong; access tokens are hidden in the message.
    """
    try:
        return plan_run(source, overrides, iterations, download=False)
    except UserError as error:
        raise UserError(TOKEN.sub("(hidden)", str(error))) from None


def examine(plan: Plan) -> list[tuple[str, Finding]]:
    """The findings of all checks with the checks' names, in a fixed order; the checks run concurrently."""
    here: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("devices", lambda: check_devices(plan)),
        ("processors", lambda: check_processors(plan)),
        ("memory", lambda: check_memory(plan)),
    ]
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("configuration", lambda: check_configuration(plan)),
        ("environments", lambda: check_environments(plan)),
        ("hooks", lambda: check_hooks(plan)),
        ("cluster", lambda: check_cluster(plan)),
        *([] if plan.config.executor.is_remote else here),
        ("models", lambda: check_models(plan)),
        ("disk", lambda: check_disk(plan)),
        ("file system", lambda: check_file_system("the run's directory", plan.config.run_directory)),
        ("file system", lambda: check_file_system("RATCHET_HOME", home())),
        ("tokens", lambda: check_tokens(plan)),
        ("hub", lambda: check_hub(plan)),
        ("network", lambda: check_loopback(needs_loopback(plan))),
        ("limits", lambda: check_limits(most_processes(plan))),
    ]
    with concurrent.futures.ThreadPoolExecutor(len(checks)) as pool:
        found = pool.map(findings_of, [check for _, check in checks])
        return [(name, finding) for (name, _), findings in zip(checks, found, strict=True) for finding in findings]


def print_findings(console: Console, findings: list[tuple[str, Finding]]) -> None:
    """Print each finding and its fix, and a summary."""
    colours = {"ok": "green", "warning": "yellow", "error": "bold red"}
    for check, finding in findings:
        line = Text(f"{finding.level:<8} ", style=colours[finding.level])
        line.append(f"{check}: {finding.found}", style="default")
        console.print(line, soft_wrap=True, highlight=False)
        if finding.fix:
            echo(console, f"{'':<8} → {finding.fix}")
    errors, warnings = (sum(finding.level == level for _, finding in findings) for level in ("error", "warning"))
    verdict = "Fix the errors before `pipeline run`." if errors else "Nothing that would stop the run was found."
    echo(console, f"{plural(errors, 'error')}, {plural(warnings, 'warning')}. {verdict}")
