"""One meaning per word: two public classes of different packages, or rooms, never share a name."""

import ast
from collections import defaultdict
from pathlib import Path

PACKAGES = ("annotation", "contracts", "embedded", "generation", "modeling", "pipelines", "training")


def test_no_two_public_classes_share_a_name(root: Path) -> None:
    places = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(path.relative_to(root).as_posix())
    assert len(places) > 200
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
