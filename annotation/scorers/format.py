"""The scorer kind `format`: whether an answer matches a template such as <think>...</think><answer>...</answer>."""

import functools
import re
from typing import Any, ClassVar, Literal

from annotation.scorers.base import ScoreConfig, WorkerSettings
from contracts.config import identity

GAP = "..."


class FormatSettings(WorkerSettings):
    """Settings of a format check."""

    kind: Literal["format"] = identity()
    """Whether a response matches a template."""
    template: str = identity("<think>...</think><answer>...</answer>", min_length=1)
    """The form: ... stands for any text, everything else for itself; whitespace between tags is ignored, and each tag
    occurs as often as here. If the chat template has already written the first tag, begin with ..."""

    calls: ClassVar[str] = "annotation.scorers.format:judge"


class FormatConfig(FormatSettings, ScoreConfig):
    """Score every completion by its format."""


def judge(*, response: str, template: str, **others: Any) -> dict[str, float]:
    """1 or 0, and the part `tags`: the share of the template's tags that occur as often as in the template."""
    pattern, tags = _compiled(template)
    right = [response.count(tag) == template.count(tag) for tag in tags]
    fits = all(right) and pattern.fullmatch(response) is not None
    return {"score": float(fits), "tags": sum(right) / len(right) if right else float(fits)}


@functools.cache
def _compiled(template: str) -> tuple[re.Pattern[str], list[str]]:
    tags = list(dict.fromkeys(re.findall(r"<[^<>]+>", template)))
    literals = [_literal(text) for text in template.split(GAP)]
    return re.compile(r"\s*" + r".*?".join(literals) + r"\s*", re.DOTALL), tags


def _literal(text: str) -> str:
    """The regular expression for literal text: any whitespace matches any whitespace, and may occur between tags."""
    words = re.split(r"\s+|(?<=>)(?=<)", text)
    return r"\s*".join(map(re.escape, words))
