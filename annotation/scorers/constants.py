"""Finds mistakes in the constants of expressions: divisions by 0, reversed bounds, conditions that never hold."""

import ast
import itertools
import math
from collections.abc import Callable
from typing import TypeAlias

Constant: TypeAlias = Callable[[ast.expr], float | None]


def mistake_in(node: ast.expr, constant: Constant) -> str | None:
    """Describe what is wrong with one operation of an expression, and how to fix it; None if nothing is.

    Args:
        constant: returns the value of a subexpression that is the same for every response; None for any other.
    """
    match node:
        case ast.BinOp(op=ast.Div(), right=right) if constant(right) == 0:
            return f"it divides by {ast.unparse(right)}, which is 0. Divide by another number."
        case ast.Call(func=ast.Name(id="clip"), args=[value, low, high]):
            least, most = constant(low), constant(high)
            if least is not None and most is not None and least > most:
                corrected = f"clip({ast.unparse(value)}, {ast.unparse(high)}, {ast.unparse(low)})"
                return f"the lower bound {least:g} is above the upper bound {most:g}. Write {corrected}."
        case ast.Call(func=ast.Name(id="overlong"), args=[_, most_tokens, cache_tokens]):
            most, cache = constant(most_tokens), constant(cache_tokens)
            if most is not None and most <= 0:
                return (
                    f"a limit of {most:g} tokens allows no response. Set most above 0 in overlong(tokens, most, cache)."
                )
            if cache is not None and (cache < 0 or (most is not None and cache > most)):
                limit = "the limit" if most is None else f"the limit of {most:g}"
                return (
                    f"the penalty cannot begin {cache:g} tokens before {limit}. Write overlong(tokens, most, cache) "
                    "with cache from 0 to most."
                )
        case ast.Call(func=ast.Name(id="lower_bound"), args=[deviations, *values]):
            if constant(deviations) is None:
                return (
                    f"{ast.unparse(deviations):.40} is not the number of standard deviations, which comes first. Write "
                    f"lower_bound(1, {', '.join(map(ast.unparse, node.args))})."
                )
            if len(values) == 1:
                return (
                    f"{ast.unparse(values[0]):.40} alone has no spread. Give two scorers or more, or write "
                    f"{ast.unparse(values[0]):.40} alone."
                )
        case ast.Compare(left=left, ops=operations, comparators=others):
            return _never_holds([left, *others], operations, constant)
    number = constant(node) if isinstance(node, ast.Call | ast.BinOp) else None
    if number is not None and not math.isfinite(number):
        return "it is not a finite number. Remove it, or correct the numbers in it."
    return None


def _never_holds(sides: list[ast.expr], operations: list[ast.cmpop], constant: Constant) -> str | None:
    """Why a chain of comparisons in one direction, such as `5 < a < 1`, holds for no response."""
    for ascending in (True, False):
        if not all(isinstance(one, (ast.Lt, ast.LtE) if ascending else (ast.Gt, ast.GtE)) for one in operations):
            continue
        known = [(side, value) for side in sides if (value := constant(side)) is not None]
        for (one, first), (other, second) in itertools.pairwise(known):
            if (first > second) if ascending else (first < second):
                return (
                    f"it never holds, because {ast.unparse(one)} is {'above' if ascending else 'below'} "
                    f"{ast.unparse(other)}. Swap them."
                )
    return None
