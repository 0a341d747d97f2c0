"""The settings of an algorithm: the keyword arguments of its functions, read from the source, with what they may be."""

import ast
import math
import operator
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from contracts.errors import UserError

Value = bool | int | float | str | None
KINDS: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str, "None": type(None)}
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
LIMIT = re.compile(r"\s*(>=|<=|>|<)\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*")


@dataclass(frozen=True)
class Setting:
    """One keyword argument of an algorithm's functions."""

    default: Value
    kinds: tuple[str, ...] = ()
    """Which of bool, int, float, str and None a value may be; empty where the source does not say so simply."""
    choices: tuple[Value, ...] = ()
    """The values of a `Literal`."""
    limits: str = ""
    """What a number must be, as LIMITS has it: `> 0, <= 1`; empty: anything finite."""

    def within_limits(self, value: Value) -> bool:
        """Whether a value of the right kind makes sense; what is no number always does."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        limits = self.limits.split(",") if self.limits else []
        return all(COMPARISONS[sign](value, number) for sign, number in map(_limit, limits))

    def fits(self, value: Any) -> bool:
        """Whether a value is of the right kind, and finite."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            return False
        if not self.kinds and not self.choices:
            return isinstance(value, bool | int | float | str | None)
        kinds = {KINDS[kind] for kind in self.kinds}
        return type(value) in kinds or (type(value) is int and float in kinds) or repr(value) in map(repr, self.choices)

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        words = {
            "bool": "true or false",
            "int": "a whole number",
            "float": "a finite number",
            "str": "a text",
            "None": "null",
        }
        kinds = [words[kind] for kind in self.kinds] + [repr(choice) for choice in self.choices]
        return " or ".join(kinds or ["a finite number, a text, true, false or null"])


def settings_of(what: str, node: ast.FunctionDef) -> Iterator[tuple[str, Setting]]:
    """The settings of a function.

    Raises:
        UserError: they are not written out so that they can be read.
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
        kinds, choices = _annotation(argument.annotation, value)
        setting = Setting(value, kinds, choices)
        if not setting.fits(value):
            raise UserError(
                f"{what}: the default of the setting {argument.arg!r} is {value!r}, not {setting.expected}."
            )
        yield argument.arg, setting


def _annotation(node: ast.expr | None, default: Value) -> tuple[tuple[str, ...], tuple[Value, ...]]:
    """Kinds and choices of a setting; nothing where the annotation is none of the simple ones."""
    if node is None:
        # A default of 1 does not say that 0.5 is wrong.
        kind = "float" if type(default) is int else type(default).__name__
        return ((), ()) if default is None else ((kind,), ())
    kinds: list[str] = []
    choices: list[Value] = []
    todo = [node]
    while todo:
        part = todo.pop(0)
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.BitOr):
            todo = [part.left, part.right, *todo]
        elif isinstance(part, ast.Subscript) and ast.unparse(part.value) in ("Literal", "typing.Literal"):
            values = part.slice.elts if isinstance(part.slice, ast.Tuple) else [part.slice]
            choices += [value.value for value in values if isinstance(value, ast.Constant)]  # type: ignore[misc]
        elif ast.unparse(part) in KINDS:
            kinds.append(ast.unparse(part))
        else:
            return (), ()
    return tuple(kinds), tuple(choices)


def _limit(text: str) -> tuple[str, float]:
    """Sign and number of a comparison such as `> 0`."""
    found = LIMIT.fullmatch(text)
    assert found is not None
    return found[1], float(found[2])
