"""Refuses secrets in configurations, because these end up in files, logs and process lists."""

import re
from typing import Any

from contracts.errors import UserError
from contracts.nested import leaves_with_paths

TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16})"
)
"""Formats of the tokens of well-known services."""
NAME = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_key)$", re.IGNORECASE)
"""Names of keys and variables that hold secrets."""


def refuse_secrets(data: Any, source: str) -> None:
    """Raise UserError if a value looks like a secret or its key is named like one; the value itself is not shown."""
    for place, value in leaves_with_paths(data):
        named = value and not isinstance(value, bool) and NAME.search(place.rpartition(".")[2])
        if named or TOKEN.search(str(value)):
            raise UserError(
                f"{source}: the value of {place!r} looks like a secret, and a configuration is written to files and "
                "shown in process lists. Take it out, and set it in the environment from which you start (export "
                "NAME=...): stages inherit it."
            )
