"""Parses and evaluates expressions over scores: `0.7 * helpful + 0.3 * form - 0.001 * tokens`.

The syntax is Python's, but no code is executed. An expression is evaluated for all answers to one prompt at once: each
name stands for a column with one number per answer, and `zscore` and `rank` normalize over a column. A value is true if
it is greater than 0; comparisons, `and`, `or` and `not` give 1 or 0. A value that cannot be computed (a division by 0)
is NaN, and its answer gets no score.
"""

import ast
import math
import operator
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from annotation.scorers.constants import mistake_in

Column = list[float]

MAX_LENGTH = 2000
"""Maximum length of an expression, in characters."""
MAX_DEPTH = 50
"""Maximum nesting depth of operations."""
EXAMPLE = "Write a computation over the names of other scorers, for example 0.7 * helpful + 0.3 * form."
"""How messages about an invalid expression end."""
ANSWER_NAMES = ("tokens", "truncated")
"""Names for properties of the answer itself: its number of tokens, and whether it was truncated (1 or 0)."""


def _divide(one: float, other: float) -> float:
    return one / other if other else math.nan


def _finite(function: Callable[..., float]) -> Callable[..., float]:
    def computed(*values: float) -> float:
        if any(map(math.isnan, values)):
            return math.nan
        try:
            return float(function(*values))
        except (OverflowError, ValueError):
            return math.nan

    return computed


def _all(*values: float) -> float:
    """1 or 0, like Python's `and`: values after the first false one are ignored."""
    return next((math.nan if math.isnan(value) else 0.0 for value in values if not value > 0), 1.0)


def _any(*values: float) -> float:
    """1 or 0, like Python's `or`: values after the first true one are ignored."""
    return next((math.nan if math.isnan(value) else 1.0 for value in values if not value <= 0), 0.0)


OPERATIONS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: lambda value: float(not value > 0),
    ast.And: _all,
    ast.Or: _any,
    ast.Lt: lambda one, other: float(one < other),
    ast.LtE: lambda one, other: float(one <= other),
    ast.Gt: lambda one, other: float(one > other),
    ast.GtE: lambda one, other: float(one >= other),
    ast.Eq: lambda one, other: float(one == other),
    ast.NotEq: lambda one, other: float(one != other),
}


def lower_bound(deviations: float, *values: float) -> float:
    """The mean of an ensemble minus `deviations` standard deviations (n in the denominator), a conservative score."""
    if not all(map(math.isfinite, values)):  # statistics.pstdev raises AttributeError
        return math.nan
    return statistics.fmean(values) - deviations * statistics.pstdev(values)


def overlong(length: float, most: float, cache: float) -> float:
    """Soft overlong penalty (DAPO, arXiv 2503.14476, equation 13): 0 up to a length of most - cache, from there falling
    linearly to -1 at `most`."""
    if length <= most - cache:
        return 0.0
    return max(-1.0, (most - cache - length) / cache) if cache > 0 else -1.0


@dataclass(frozen=True)
class Function:
    """A scalar function: the minimum and maximum number of arguments, and the implementation."""

    min_arguments: int
    max_arguments: int | None
    compute: Callable[..., float]
    usage: str = "(x)"


FUNCTIONS = {
    "min": Function(1, None, min, "(x, y, ...)"),
    "max": Function(1, None, max, "(x, y, ...)"),
    "mean": Function(1, None, lambda *values: statistics.fmean(values), "(x, y, ...)"),
    "lower_bound": Function(2, None, lower_bound, "(deviations, x, y, ...)"),
    "abs": Function(1, 1, abs),
    "clip": Function(3, 3, lambda value, low, high: min(max(value, low), high), "(x, low, high)"),
    "exp": Function(1, 1, math.exp),
    "log": Function(1, 1, math.log),
    "sqrt": Function(1, 1, math.sqrt),
    "sigmoid": Function(1, 1, lambda value: (1 + math.tanh(value / 2)) / 2),
    "tanh": Function(1, 1, math.tanh),
    "overlong": Function(3, 3, overlong, "(length, most, cache)"),
}
"""Functions of the numbers of one answer."""


def zscore(values: Column) -> Column:
    """Distances from the mean in standard deviations (n - 1 in the denominator); 0 if all values are equal."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = statistics.fmean(values)
    return [(value - mean) / spread if spread else 0.0 for value in values]


def rank(values: Column) -> Column:
    """For each value, the share of the other values that are lower, from 0 to 1; ties count half. A single value
    gets 0.5."""
    if len(values) < 2:
        return [0.5] * len(values)
    lower = [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]
    return [count / (len(values) - 1) for count in lower]


def _among_finite(function: Callable[[Column], Column], values: Column) -> Column:
    """Apply `function` to the finite values alone; the others, whose answers get no score, become nan."""
    found = iter(function(finite) if (finite := [value for value in values if math.isfinite(value)]) else [])
    return [next(found) if math.isfinite(value) else math.nan for value in values]


GROUP_FUNCTIONS: dict[str, Callable[[Column], Column]] = {"zscore": zscore, "rank": rank}
"""Functions of the numbers of all answers to a prompt."""
STANDARD = "standard"
"""`standard(NAME)`: a scorer's score, standardised by the mean and standard deviation of published scores."""
KNOWN = sorted([*FUNCTIONS, *GROUP_FUNCTIONS, STANDARD])


class Expression:
    """A parsed and checked expression."""

    def __init__(self, text: str) -> None:
        """Parse and check `text`.

        Raises:
            ValueError: it is not an expression, or contains something that is not allowed.
        """
        if len(text) > MAX_LENGTH:
            raise ValueError(f"it has {len(text)} characters, more than the maximum of {MAX_LENGTH}.")
        if not text.strip():
            raise ValueError(f"it is empty. {EXAMPLE}")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            problem = error.msg if isinstance(error, SyntaxError) else str(error)
            raise ValueError(f"not an expression: {problem.rstrip('.?')}. {EXAMPLE}") from error
        self.text = text
        self._tree = tree
        self.names: dict[str, tuple[str, str | None]] = {}
        """The (scorer, part) that each name in the expression (`helpful`, `helpful.clear`) refers to."""
        self.standardised: set[str] = set()
        """Scorers whose published scores it needs, for `standard`."""
        self._check(tree, 0)
        if not self.names:
            raise ValueError(
                f"it names no scorer, so every answer would be scored by its length alone at best. {EXAMPLE}"
            )
        self._check_constants(tree)

    def _check(self, node: ast.expr, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"operations are nested more than {MAX_DEPTH} levels deep.")
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                if (isinstance(value, int) and abs(value) > 1 << 1000) or not math.isfinite(value):
                    raise ValueError(f"the number {ast.unparse(node):.40} is too large.")
            case ast.Name(id=name):
                self._add_name(name, name, None)
            case ast.Attribute(value=ast.Name(id=name), attr=part):
                self._add_name(f"{name}.{part}", name, part)
            case ast.Attribute(value=ast.Attribute()):
                raise ValueError(
                    f"{ast.unparse(node):.60} is not allowed: it has more than one dot. A name is SCORER or "
                    "SCORER.PART, and parts have no parts."
                )
            case ast.Tuple(elts=[]):
                raise ValueError(f"() is not allowed: there is nothing in the parentheses. {EXAMPLE}")
            case (
                ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div())
                | ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not())
            ):
                self._check_all(node, depth)
            case ast.BoolOp() | ast.IfExp():
                self._check_all(node, depth)
            case ast.Compare() if all(type(one) in OPERATIONS for one in node.ops):
                self._check_all(node, depth)
            case ast.Call(func=ast.Name(id=name), args=given, keywords=[]):
                self._check_call(name, given, depth)
            case _:
                raise ValueError(
                    f"{ast.unparse(node):.60} is not allowed; there are numbers, names of scorers and their parts "
                    f"(helpful, helpful.clear), {', '.join(ANSWER_NAMES)}, + - * /, comparisons, and, or, not, "
                    f"A if B else C, and the functions {', '.join(KNOWN)}."
                )

    def _check_all(self, node: ast.expr, depth: int) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._check(child, depth + 1)

    def _check_call(self, name: str, given: list[ast.expr], depth: int) -> None:
        function = FUNCTIONS.get(name)
        least, most = (function.min_arguments, function.max_arguments) if function else (1, 1)
        if function is None and name not in GROUP_FUNCTIONS and name != STANDARD:
            raise ValueError(f"no function {name}; there are {', '.join(KNOWN)}.")
        if len(given) < least or (most is not None and len(given) > most):
            wanted = f"{least}" if most == least else f"{least} or more"
            noun = "value" if wanted == "1" else "values"
            usage = f"{name}{function.usage}" if function else f"{name}({'NAME' if name == STANDARD else 'x'})"
            raise ValueError(f"{name} takes {wanted} {noun}, and is given {len(given)}. Write {usage}.")
        if name == STANDARD:
            if not isinstance(given[0], ast.Name) or given[0].id in ANSWER_NAMES:
                raise ValueError(
                    f"{STANDARD} takes the name of a scorer alone, and is given {ast.unparse(given[0]):.40}."
                )
            self.standardised.add(given[0].id)
        for one in given:
            self._check(one, depth + 1)

    def _check_constants(self, tree: ast.expr) -> None:
        """Reject mistakes in constants.

        Raises:
            ValueError: a division by 0, bounds in the wrong order, a comparison that never holds.
        """

        def constant(node: ast.expr) -> float | None:
            called = {id(inner.func) for inner in ast.walk(node) if isinstance(inner, ast.Call)}
            if any(isinstance(inner, ast.Name) and id(inner) not in called for inner in ast.walk(node)):
                return None
            return self._column(node, {}, {}, 1)[0]

        for node in ast.walk(tree):
            if isinstance(node, ast.expr) and (wrong := mistake_in(node, constant)):
                raise ValueError(f"{ast.unparse(node):.60}: {wrong}")

    def _add_name(self, written: str, scorer: str, part: str | None) -> None:
        if scorer not in ANSWER_NAMES:
            self.names[written] = (scorer, part)
        elif part is not None:
            raise ValueError(f"{scorer} has no parts.")

    @property
    def scorers(self) -> list[str]:
        """The scorers that the expression names, in order of appearance."""
        return list(dict.fromkeys(scorer for scorer, _ in self.names.values()))

    @property
    def ensemble(self) -> list[str]:
        """The scorers that form an ensemble: those in the first mean, min or lower_bound over the whole scores of two
        or more scorers."""
        for node in ast.walk(self._tree):
            match node:
                case ast.Call(func=ast.Name(id="mean" | "min" | "lower_bound"), args=given):
                    names = [one.id for one in given if isinstance(one, ast.Name) and one.id not in ANSWER_NAMES]
                    if len(dict.fromkeys(names)) > 1:
                        return list(dict.fromkeys(names))
        return []

    def compute(self, columns: Mapping[str, Column], standards: Mapping[str, tuple[float, float]]) -> Column:
        """One number for each answer to a prompt; NaN if it cannot be computed.

        Args:
            columns: for each name in `names` and `ANSWER_NAMES`, one number per answer.
            standards: mean and standard deviation of each scorer in `standardised`.
        """
        size = len(next(iter(columns.values())))
        return self._column(self._tree, columns, standards, size)

    def explain(self, columns: Mapping[str, Column], standards: Mapping[str, tuple[float, float]], place: int) -> str:
        """Explain which subexpression has no finite value for the answer at index `place`; for the other arguments see
        `compute`."""
        size = len(next(iter(columns.values())))

        def value(node: ast.expr) -> float:
            return self._column(node, columns, standards, size)[place]

        def innermost(node: ast.expr) -> ast.expr:
            match node:
                case ast.IfExp(test=test, body=body, orelse=other):
                    inner = [test, body if value(test) > 0 else other]
                case ast.Call(args=given):
                    inner = given
                case _:
                    inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
            return next((innermost(one) for one in inner if not math.isfinite(value(one))), node)

        match found := innermost(self._tree):
            case ast.BinOp(op=ast.Div(), right=right) if value(right) == 0:
                return f"{ast.unparse(found)} divides by {ast.unparse(right)}, which is 0"
        return f"{ast.unparse(found)} is not a finite number"

    def _column(
        self, node: ast.expr, columns: Mapping[str, Column], standards: Mapping[str, tuple[float, float]], size: int
    ) -> Column:
        def of(inner: ast.expr) -> Column:
            return self._column(inner, columns, standards, size)

        match node:
            case ast.Constant(value=value):
                return [float(value)] * size  # type: ignore[arg-type]
            case ast.Name() | ast.Attribute():
                return columns[ast.unparse(node)]
            case ast.BinOp(left=left, op=operation, right=right):
                return list(map(_finite(OPERATIONS[type(operation)]), of(left), of(right)))
            case ast.UnaryOp(op=sign, operand=operand):
                return list(map(_finite(OPERATIONS[type(sign)]), of(operand)))
            case ast.BoolOp(op=joined, values=operands):
                return list(map(OPERATIONS[type(joined)], *map(of, operands)))
            case ast.IfExp(test=test, body=body, orelse=other):
                chosen = zip(of(test), of(body), of(other), strict=True)
                return [
                    math.nan if math.isnan(condition) else yes if condition > 0 else no for condition, yes, no in chosen
                ]
            case ast.Compare(left=left, ops=operations, comparators=others):
                sides = [of(side) for side in (left, *others)]
                holds = [
                    list(map(_finite(OPERATIONS[type(one)]), sides[place], sides[place + 1]))
                    for place, one in enumerate(operations)
                ]
                return list(map(_finite(min), *holds)) if len(holds) > 1 else holds[0]
            case ast.Call(func=ast.Name(id=name), args=given):
                values = [of(one) for one in given]
                if name in GROUP_FUNCTIONS:
                    return _among_finite(GROUP_FUNCTIONS[name], values[0])
                if name == STANDARD:
                    mean, spread = standards[ast.unparse(given[0])]
                    return [_divide(value - mean, spread) for value in values[0]]
                return list(map(_finite(FUNCTIONS[name].compute), *values))
        raise AssertionError(ast.dump(node))


def cycle_in(components: Mapping[str, list[str]]) -> list[str] | None:
    """A cycle among combined scorers, as a path from a scorer through the scorers it reads back to itself, or None."""

    def paths(name: str, path: list[str]) -> Iterator[list[str]]:
        if name in path:
            yield [*path[path.index(name) :], name]
            return
        for component in components.get(name, []):
            yield from paths(component, [*path, name])

    return next((found for name in components for found in paths(name, [])), None)
