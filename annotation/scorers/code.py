"""The scorer kind `code`: runs the program in an answer against tests, in a sandbox."""

import re
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import msgspec

from annotation.sandbox.process import Limits, ProgramResult, adopt_orphans, namespaces_error, run
from annotation.scorers.base import ScoreConfig, WorkerSettings
from contracts.config import identity
from contracts.errors import UserError
from contracts.preflight import Finding, Inspected

BLOCK = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
MAX_SHOWN = 500


class CodeSettings(WorkerSettings):
    """Settings of a code verifier."""

    kind: Literal["code"] = identity()
    """Whether the Python program in a response passes the tests in the prompt's `answer`: Python with assertions, a
    JSON list of such texts, or {"inputs": [...], "outputs": [...]}, stdin and expected output."""
    partial: bool = identity(False)
    """Score the share of tests that pass, instead of 1 if all do and else 0."""
    seconds: float = identity(10.0, gt=0)
    """Time limit of the program: with all its assertions, or with one input."""
    memory_mib: int = identity(1024, ge=64)
    """Memory limit of each of its processes, in MiB."""
    max_processes: int = identity(8, ge=2)
    """Maximum number of its processes and threads."""
    isolation: Literal["full", "limits"] = identity("full")
    """full: in its own namespaces, without network and with writes only to its own files; refused if the kernel does
    not support it. limits: only limits of time, memory and processes."""

    calls: ClassVar[str] = "annotation.scorers.code:CodeVerifier"

    def preflight(self, stage: Inspected) -> Iterator[Finding]:
        """Check that this machine can run programs in the configured isolation."""
        if error := self._isolation_error():
            yield Finding("error", error)

    def check(self) -> None:
        """Check that this machine can run programs in the configured isolation."""
        if error := self._isolation_error():
            raise UserError(error)

    def _isolation_error(self) -> str | None:
        error = namespaces_error() if self.isolation == "full" else None
        if error is None:
            return None
        return (
            f"kind=code runs a model's programs in their own namespaces, which this machine does not allow ({error}). "
            "Let users create them (sysctl kernel.unprivileged_userns_clone=1, or in a container --security-opt "
            "seccomp=unconfined), or set isolation=limits where programs can do no harm."
        )

    @property
    def reads_answer(self) -> bool:
        """Whether it requires the prompt's known `answer`: always."""
        return True


class CodeConfig(CodeSettings, ScoreConfig):
    """Score every completion by running its program against tests."""


class CodeVerifier:
    """Runs the programs in answers against the tests of their prompts."""

    def __init__(
        self,
        *,
        partial: bool,
        seconds: float,
        memory_mib: int,
        max_processes: int,
        isolation: Literal["full", "limits"],
    ) -> None:
        self.partial = partial
        self.limits = Limits(seconds, memory_mib << 20, max_processes, namespaces=isolation == "full")
        adopt_orphans()

    def __call__(self, *, response: str, answer: str | None, **others: Any) -> dict[str, Any] | None:
        """A score from 0 to 1, the part `passed` (share of passed tests) and how the program ended; None if the prompt
        has no tests."""
        if answer is None or not answer.strip():
            return None
        blocks = BLOCK.findall(response)
        code = blocks[-1] if blocks else response
        passed, ended = self._examine(code, answer)
        share = sum(passed) / len(passed)
        return {"score": share if self.partial else float(share == 1), "passed": share, "ended": ended}

    def _examine(self, code: str, answer: str) -> tuple[list[bool], str]:
        """Whether each test passed, and how the program ended: in the first failed test, or else in the last one."""
        tests = _tests(answer)
        if isinstance(tests, list):
            ran = run(code, self.limits, tests)
            return [number in ran.passed for number in range(len(tests))], _ending(ran, len(tests))
        passed, endings = [], []
        for given, wanted in zip(tests["inputs"], tests["outputs"], strict=True):
            ran = run(code, self.limits, stdin=given)
            passed.append(ran.code == 0 and _lines(ran.stdout) == _lines(wanted))
            endings.append("ok" if passed[-1] else _ending(ran) if ran.code != 0 else "wrong output")
        return passed, next((ending for ending in endings if ending != "ok"), "ok")


def _tests(answer: str) -> list[str] | dict[str, list[str]]:
    """The tests in an answer: Python texts with assertions, or inputs with their expected outputs.

    Raises:
        UserError: the answer is JSON of another form, or a test is not valid Python.
    """
    try:
        found = msgspec.json.decode(answer)
    except msgspec.DecodeError:
        return _compiled(answer, [answer])
    if isinstance(found, dict) and found.keys() >= {"inputs", "outputs"}:
        inputs, outputs = found["inputs"], found["outputs"]
        texts = isinstance(inputs, list) and isinstance(outputs, list) and all(map(_is_text, [*inputs, *outputs]))
        if texts and len(inputs) == len(outputs) > 0:
            return {"inputs": inputs, "outputs": outputs}
    elif isinstance(found, list) and found and all(map(_is_text, found)):
        return _compiled(answer, found)
    raise UserError(
        f"the prompt's answer {answer!r:.200} holds no tests: write Python with assertions, a JSON list of such texts, "
        'or {"inputs": [...], "outputs": [...]} with as many texts in each.'
    )


def _compiled(answer: str, tests: list[str]) -> list[str]:
    """Check that the tests compile, and return them.

    Raises:
        UserError: a test is not valid Python, so that every program would fail it.
    """
    for number, test in enumerate(tests):
        try:
            with warnings.catch_warnings(action="ignore"):
                compile(test, f"test {number}", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            invalid = "that is not valid Python"
            what = f"holds a test {invalid}" if len(tests) == 1 else f"has a test {number} {invalid}"
            raise UserError(f"the prompt's answer {answer!r:.200} {what}: {type(error).__name__}: {error}.") from error
    return tests


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _lines(text: str) -> list[str]:
    """Lines of a text without trailing whitespace and trailing empty lines."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _ending(ran: ProgramResult, tests: int = 0) -> str:
    """A description of how a program ended; an exit before all of its tests began is not "ok"."""
    last = (ran.stderr.strip().splitlines() or [""])[-1][:MAX_SHOWN]
    if ran.code is None:
        return f"ended after {ran.seconds:.0f} s" if ran.seconds > 0.5 else "said too much"
    how = "ok" if ran.code == 0 else f"exit code {ran.code}" if ran.code < 128 else f"signal {ran.code - 128}"
    if ran.code == 0 and len(ran.passed) + len(ran.failed) < tests:
        how = f"ended by itself in test {ran.begun - 1}" if ran.begun else "ended by itself before its tests"
    return f"{how}: {last}" if last else how
