"""Reads and writes a subset of YAML: mappings, lists, text, numbers, true, false and null.

It is YAML 1.2 as ruamel.yaml reads it: `1e-5` is a number; `no`, `on` and `12:30` are text; duplicate keys are errors.
There are two differences: dates are text, and aliases are expanded up to a limit and must not contain themselves.
"""

import io
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

MOST_VALUES = 200_000
"""Maximum number of values in one document, with all aliases expanded."""
MOST_LEVELS = 64
"""Maximum nesting depth of lists and mappings."""
MOST_DIGITS = 400
"""Maximum number of digits in a number; the largest double has 309."""
MOST_BYTES = 16 << 20

TAG = "tag:yaml.org,2002:"
READ = {f"{TAG}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
TEXT = {f"{TAG}timestamp", f"{TAG}value"}
"""Tags that YAML gives to a date and to `=`, which are read as text."""
KEYS = {f"{TAG}str", f"{TAG}int", f"{TAG}merge"}

PLAIN_REASONS = {
    r".*'\\t'.*": "a tab. Indent with spaces",
    ".*found another document": "a second document begins (---). Keep one",
    "maximum depth of data structure exceeded.*": f"more than {MOST_LEVELS} nested lists and sections",
    'found duplicate (?:merge )?key "(.*?)".*': r"the key '\1' occurs twice",
}


class YamlError(Exception):
    """The reason why a text cannot be read; `line` counts from 1, and is None if unknown."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def load(text: str) -> Any:
    """Parse a document into plain data; all keys are text.

    Raises:
        YamlError: it is not valid YAML, or uses a feature that is not supported.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = MOST_LEVELS
    yaml.Composer = _Composer
    try:
        return yaml.load(text)
    except ReaderError as error:
        reason = f"the character U+{error.character:04X}, which YAML does not allow"
        raise YamlError(reason, text.count("\n", 0, error.position) + 1) from error
    except MarkedYAMLError as error:
        reason = str(error.problem or error.context)
        for found, plain in PLAIN_REASONS.items():
            reason = re.sub(found, plain, reason, flags=re.DOTALL)
        raise YamlError(reason, error.problem_mark.line + 1 if error.problem_mark else None) from error
    except (ValueError, LookupError) as error:  # from a tag that does not fit its value (!!int x)
        raise YamlError(str(error)) from error


class _Composer(Composer):
    """A composer that refuses unsupported nodes."""

    def get_single_node(self) -> Node | None:
        """Compose and check the whole document."""
        self.warn_double_anchors = False  # the later anchor counts
        node: Node | None = super().get_single_node()
        if node is not None:
            _check(node, {})
        return node


def _check(node: Node, sizes: dict[Node, tuple[int, int] | None]) -> tuple[int, int]:
    """Count the values and levels of a node with its aliases expanded; refuse unsupported nodes and excessive sizes."""
    if node in sizes:
        if (known := sizes[node]) is None:
            raise _problem("an alias (*) contains itself, as a part of what it repeats. Write it out", node)
        return known
    sizes[node] = None
    if node.tag in TEXT:
        node.tag = f"{TAG}str"
    if node.tag not in READ:
        shown = str(node.tag).replace(TAG, "!!")
        raise _problem(f"the tag {shown} is not read here. Write a plain value without a tag", node)
    if node.tag in (f"{TAG}int", f"{TAG}float") and len(node.value) > MOST_DIGITS:
        raise _problem(f"a number of {len(node.value)} digits. Put it in quotes if it is text", node)
    parts = [] if isinstance(node, ScalarNode) else list(node.value)
    if isinstance(node, MappingNode):
        for key, _ in node.value:
            if key.tag not in KEYS:
                shown = key.value if isinstance(key, ScalarNode) else "a list or a section"
                raise _problem(f"a key must be text, not {shown or 'nothing'}. Put it in quotes", key)
            if key.tag != f"{TAG}merge":
                key.tag = f"{TAG}str"
        parts = [part for item in node.value for part in item]
    inner = [_check(part, sizes) for part in parts]
    values, levels = 1 + sum(part[0] for part in inner), 1 + max((part[1] for part in inner), default=0)
    if values > MOST_VALUES or levels > MOST_LEVELS:
        found = f"{MOST_VALUES} values" if values > MOST_VALUES else f"{MOST_LEVELS} nested lists and sections"
        raise _problem(f"more than {found} once its aliases (*) are expanded. Repeat less", node)
    sizes[node] = values, levels
    return values, levels


def _problem(text: str, node: Node) -> MarkedYAMLError:
    return MarkedYAMLError(problem=text, problem_mark=node.start_mark)


def dump(data: Any) -> str:
    """Write plain data, in its order, as YAML that parsers of versions 1.1 and 1.2 read alike."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.version = (1, 1)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue().removeprefix("%YAML 1.1\n---\n")


class _Representer(SafeRepresenter):
    """Also quotes text that YAML 1.2 would not read as text, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always true: a repeated value is written out each time."""
        return True

    def represent_text(self, data: str) -> ScalarNode:
        """Quote text that YAML 1.2 would not read as text; `dump` takes care of YAML 1.1."""
        is_plain = VersionedResolver((1, 2)).resolve(ScalarNode, data, (True, False)) == f"{TAG}str"
        style = '"' if not data.isprintable() else None if is_plain else "'"
        return self.represent_scalar(f"{TAG}str", data, style=style)


_Representer.add_representer(str, _Representer.represent_text)
