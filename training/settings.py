"""Reads an algorithm's settings, the keyword arguments of its functions, from its source, and checks their values."""

import ast
import functools
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from contracts.errors import UserError

Value = bool | int | float | str | None
_CONSTANT = r"(?:'[^'\\]*'|-?\d+|True|False|None)"
_SIMPLE = rf"(?:bool|int|float|str|None|Literal\[{_CONSTANT}(?:, {_CONSTANT})*\])"
TYPE = re.compile(rf"{_SIMPLE}(?: \| {_SIMPLE})*")
"""Annotations that are checked; with any other annotation, every simple value is accepted."""
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
LIMIT = r"\s*(>=|<=|>|<)\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*"


@dataclass(frozen=True)
class Setting:
    """One keyword argument of an algorithm's functions."""

    default: Value
    type: str = "bool | int | float | str | None"
    """The annotation, as source text."""
    limits: str = ""
    """Bounds of a number, as in LIMITS: `> 0, <= 1`; empty: any finite number."""

    def check(self, value: Any) -> Value:
        """Return the value as this setting's type.

        Raises:
            ValueError: the value has the wrong type or is out of bounds; the message says what is allowed.
        """
        try:
            found: Value = _adapter(self.type).validate_python(value)
        except ValidationError as error:
            words = [problem["msg"].removeprefix("Input should be ") for problem in error.errors()]
            raise ValueError(" or ".join(dict.fromkeys(words))) from error
        if isinstance(found, int | float) and not isinstance(found, bool):
            for sign, number in re.findall(LIMIT, self.limits):
                if not COMPARISONS[sign](found, float(number)):
                    raise ValueError(self.limits)
        return found


@functools.cache
def _adapter(text: str) -> TypeAdapter[Any]:
    # `text` matches TYPE, so eval is safe.
    return TypeAdapter(eval(text, {"Literal": Literal}), config=ConfigDict(strict=True, allow_inf_nan=False))


def settings_of(what: str, node: ast.FunctionDef) -> Iterator[tuple[str, Setting]]:
    """Yield the settings of a function by name.

    Raises:
        UserError: the function's signature is wrong, or a default is missing, not a literal or invalid.
    """
    arguments = node.args
    if len(arguments.posonlyargs + arguments.args) != 1 or arguments.vararg or arguments.kwarg:
        raise UserError(
            f"{what} must take one argument and then settings by keyword: "
            f"def {node.name}(batch, *, beta: float = 0.1); found ({ast.unparse(arguments)})."
        )
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is None:
            raise UserError(f"{what}: the setting {argument.arg!r} has no default; give it one.")
        try:
            value = ast.literal_eval(default)
        except (TypeError, ValueError):
            value = ...
        if not isinstance(value, bool | int | float | str | None):
            raise UserError(
                f"{what}: the default of the setting {argument.arg!r} is read without running the file; write a "
                f"number, a text, True, False or None, not {ast.unparse(default)}."
            )
        setting = Setting(value, _type_of(argument.annotation, value))
        try:
            setting.check(value)
        except ValueError as error:
            raise UserError(
                f"{what}: the default of the setting {argument.arg!r} is {value!r}, but must be {error}."
            ) from error
        yield argument.arg, setting


def _type_of(node: ast.expr | None, default: Value) -> str:
    """A setting's annotation if it matches TYPE; otherwise that of any simple value."""
    if node is None and default is not None:
        # A default of 1 does not mean that 0.5 is wrong.
        return "float" if type(default) is int else type(default).__name__
    text = "" if node is None else ast.unparse(node).replace("typing.", "")
    return text if TYPE.fullmatch(text) else Setting.type
