"""The scorer kind `rule`: a user's own Python function or class, called in worker processes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from annotation.scorers.base import ScoreConfig, WorkerSettings
from contracts.callables import source_files
from contracts.config import PathText, identity, input_path, runtime
from contracts.declaration import load
from contracts.preflight import Finding, Inspected


class RuleSettings(WorkerSettings):
    """Settings of a Python function or class."""

    kind: Literal["rule"] = identity()
    """A Python function or class."""
    function: PathText = identity()
    """package.module:function or file.py:function. A function is called once per completion with the keywords messages,
    response, finish_reason and answer, or, if it has the parameter `samples`, with a list of many; a class is
    instantiated once and called likewise. It returns a number, a mapping with `score` and further results, or None if
    it cannot score the response."""
    settings: dict[str, Any] = identity({}, later=True)
    """Further keyword arguments of the function, or of the class's constructor."""
    batch: int = identity(64, later=True, ge=1)
    """Completions per call of a batched function; the number of concurrent calls of an async function."""
    inputs: list[Path] | None = input_path(None, min_length=1)
    """Files, models or other directories that the function reads, in addition to its own modules. When their content
    changes, scores are recomputed. A function with a keyword `inputs` gets these paths."""
    judge_twice: int = runtime(0, ge=0)
    """Completions of each shard that are scored a second time, to check that the score is the same; if it is not, the
    stage stops. Use 0 for scorers that cost money or are not deterministic."""

    calls: ClassVar[str] = ""
    can_reward_tokens: ClassVar[bool] = True
    keyed_with_legacy_fields: ClassVar[bool] = True

    @property
    def target(self) -> str:
        """Path of the function or class."""
        return self.function

    @property
    def title(self) -> str:
        """The function's name in messages."""
        return f"function {self.function!r}"

    @property
    def keywords(self) -> dict[str, Any]:
        """Further keyword arguments of the function, or of the class's constructor: its `settings`."""
        return self.settings

    @property
    def user_paths(self) -> list[Path] | None:
        """The user's paths that it reads."""
        return self.inputs

    @property
    def samples_per_call(self) -> int:
        """Answers per call, if the function takes several."""
        return self.batch

    @property
    def rechecked(self) -> int:
        """Number of answers per shard that are scored a second time."""
        return self.judge_twice

    @property
    def display_name(self) -> str:
        """The function's path."""
        return self.function

    def source_files(self) -> dict[str, Path]:
        """The file of the function, and the user's own modules that it imports."""
        return source_files(self.function)

    def preflight(self, stage: Inspected) -> Iterator[Finding]:
        """Import the function as the stage will."""
        late = load("annotation.workers.rule:check_function")(self)
        if late is not None:
            yield Finding("warning", late)


class RuleConfig(RuleSettings, ScoreConfig):
    """Score every completion with a Python function."""
