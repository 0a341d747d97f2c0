"""All YAML that Ratchet reads and writes, of which little is read: mappings, lists, text, numbers, true, false, null.

Plain words are what YAML 1.2 says they are, with two differences that spare surprises. `1e-5` is a number; `no`, `on`,
`12:30`, `2026-01-01` and `010` are text, which a field that wants a yes or a number still understands.
Aliases may repeat what is written, up to a limit, and never contain themselves.
"""

import re
from typing import Any

import yaml

MOST_VALUES = 200_000
"""Values of one text with all aliases written out."""
MOST_LEVELS = 64
"""Lists and mappings in each other."""
MOST_DIGITS = 400
"""Digits of a number; the largest that a computer calculates with has 309."""
MOST_BYTES = 16 << 20

INTEGER = re.compile("[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)")
FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
PLAIN = {
    "bool": (re.compile("true|True|TRUE|false|False|FALSE"), "tTfF"),
    "int": (INTEGER, "-+0123456789"),
    "float": (FLOAT, "-+.0123456789"),
    "null": (re.compile("~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "merge": (re.compile("<<"), "<"),
}
"""How a word without quotes is recognised, and the letters that it begins with."""
TAG = "tag:yaml.org,2002:"

IN_WORDS = {
    "'\\t'": "a tab. Indent with spaces",
    "found another document": "a second document begins (---). Keep one",
}


class _Reader(yaml.SafeLoader):
    """Reads what this module's first lines say, with its limits."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.levels = 0
        self.measures: dict[int, tuple[int, int] | None] = {}  # by a node's identity; None while it is measured

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, in no more than so many others."""
        self.levels += 1
        if self.levels > MOST_LEVELS:
            raise _problem(f"more than {MOST_LEVELS} lists and sections in each other", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self.levels -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """The whole text as nodes, which is not too much once all aliases are written out."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            self.measure(node)
        return node

    def measure(self, node: yaml.Node) -> tuple[int, int]:
        """How many values a node stands for, and how many levels of them."""
        if id(node) in self.measures:
            if (known := self.measures[id(node)]) is None:
                raise _problem("an alias (*) contains itself, inside of what it repeats. Write it out", node.start_mark)
            return known
        self.measures[id(node)] = None
        inner: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [self.measure(part) for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        values, levels = 1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0)
        if values > MOST_VALUES or levels > MOST_LEVELS:
            found = (
                f"{MOST_VALUES} values" if values > MOST_VALUES else f"{MOST_LEVELS} lists and sections in each other"
            )
            raise _problem(f"more than {found} once its aliases (*) are written out. Repeat less", node.start_mark)
        self.measures[id(node)] = values, levels
        return values, levels

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are text or whole numbers, each of which occurs once."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{TAG}merge":
                continue
            if key_node.tag not in (f"{TAG}str", f"{TAG}int"):
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or a section"
                raise _problem(f"a key must be text, not {shown or 'nothing'}. Put it in quotes", key_node.start_mark)
            key = str(self.construct_object(key_node, deep=True))  # type: ignore[no-untyped-call]
            if key in seen:
                raise _problem(f"the key {key!r} occurs twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number that is not too long."""
        text = str(self.construct_scalar(node)).replace("_", "")
        if len(text) > MOST_DIGITS:
            raise _problem(f"a number of {len(text)} digits. Put it in quotes if it is text", node.start_mark)
        try:
            if node.tag == f"{TAG}int":
                return int(text, 0)
            special = {"inf": float("inf"), "nan": float("nan")}.get(text.lower().lstrip("-+."))
            number = float(text) if special is None else -special if text[0] == "-" else special
        except ValueError:
            raise _problem(f"{text!r} is no number", node.start_mark) from None
        if special is None and abs(number) == float("inf"):
            raise _problem(f"the number {text} is too large. Put it in quotes if it is text", node.start_mark)
        return number

    def construct_truth(self, node: yaml.ScalarNode) -> bool:
        """True or false."""
        text = str(self.construct_scalar(node)).lower()
        if text not in ("true", "false"):
            raise _problem(f"{text!r} is neither true nor false", node.start_mark)
        return text == "true"

    def refuse_tag(self, node: yaml.Node) -> None:
        """Other tags can stand for anything, even for running code."""
        shown = node.tag.replace(TAG, "!!")
        raise _problem(f"the tag {shown} is not read here. Write a plain value without a tag", node.start_mark)


class _Writer(yaml.SafeDumper):
    """Puts all text into quotes that `_Reader` or a reader of YAML 1.1 would take for something else; no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Whether to write a value out each time that it occurs."""
        return True


class YamlError(Exception):
    """Text that cannot be read, with the reason; `line` counts from 1, where it is known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def load(text: str) -> Any:
    """The plain data that a text stands for.

    Raises:
        YamlError: it is no YAML, or has what this module does not read.
    """
    try:
        return yaml.load(text, _Reader)
    except yaml.reader.ReaderError as error:
        reason = f"the character U+{error.character:04X}, which no text has"
        raise YamlError(reason, text.count("\n", 0, error.position) + 1) from error
    except yaml.MarkedYAMLError as error:
        reason = error.problem or str(error)
        for found, plain in IN_WORDS.items():
            reason = plain if found in reason else reason
        raise YamlError(reason, error.problem_mark.line + 1 if error.problem_mark else None) from error


def dump(data: Any) -> str:
    """Plain data as text, in the order that it has."""
    return yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True)


def _problem(text: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


_Reader.yaml_implicit_resolvers = {}
_Reader.yaml_constructors = {}
for _name, (_pattern, _first) in PLAIN.items():
    for _class in (_Reader, _Writer):
        _class.add_implicit_resolver(f"{TAG}{_name}", re.compile(f"^(?:{_pattern.pattern})$"), list(_first))  # type: ignore[no-untyped-call]
for _name, _method in {
    "str": yaml.SafeLoader.construct_yaml_str,
    "seq": yaml.SafeLoader.construct_yaml_seq,
    "map": yaml.SafeLoader.construct_yaml_map,
    "null": yaml.SafeLoader.construct_yaml_null,
    "int": _Reader.construct_number,
    "float": _Reader.construct_number,
    "bool": _Reader.construct_truth,
}.items():
    _Reader.add_constructor(f"{TAG}{_name}", _method)  # type: ignore[no-untyped-call]
_Reader.add_constructor(None, _Reader.refuse_tag)  # type: ignore[no-untyped-call]
