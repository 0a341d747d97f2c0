"""One meaning per word: no two public classes share a name, and the texts use the words of docs/glossary.md."""

import ast
import re
from collections import defaultdict
from pathlib import Path

PACKAGES = ("annotation", "contracts", "embedded", "generation", "modeling", "pipelines", "reallocation", "training")


def test_no_two_public_classes_share_a_name(root: Path) -> None:
    places = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(path.relative_to(root).as_posix())
    assert len(places) > 200
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


TRANSLATED = {
    r"mend(s|ed|ing)?": "fix",
    r"accidents?": "transient failure",
    r"last[ _]words": "log tail",
    r"meeting[ _]points?": "rendezvous",
    r"(un)?settl(e|es|ed|ing)": "finalize, prepare",
    r"conclud(e|es|ed|ing)": "finalize",
    r"catalogues?": "registry",
    r"(?<!-m )embedded world": "toy task",
}
"""Words that this field has another word for (docs/glossary.md)."""
PUBLISHED = {"generation/run.py": {"settled"}}
"""Keys of published files, which stay as they are."""


def test_no_text_uses_a_word_that_the_field_has_another_for(root: Path) -> None:
    folders = (*PACKAGES, "benchmarks", "docs", "scripts", "tests")
    paths = [root / "README.md", *(path for name in folders for path in sorted((root / name).rglob("*.*")))]
    pattern = re.compile(rf"(?<![A-Za-z])({'|'.join(TRANSLATED)})(?![A-Za-z])", re.IGNORECASE)
    found = [
        f"{path.relative_to(root)}: {match[0]}"
        for path in paths
        if path.suffix in (".py", ".md", ".sh") and path != Path(__file__).resolve()
        for match in pattern.finditer(path.read_text())
        if match[0] not in PUBLISHED.get(path.relative_to(root).as_posix(), ())
    ]
    assert len(paths) > 400
    assert found == []
    assert [match[0] for match in pattern.finditer("It mends_ last_words, Catalogue; no amendment, settlement")] == [
        "mends",
        "last_words",
        "Catalogue",
    ]


def test_the_glossary_is_in_order_and_has_each_word_once(root: Path) -> None:
    rows = re.findall(r"^\| (.+?) \| ", (root / "docs/glossary.md").read_text(), re.MULTILINE)[1:]
    words = [row.split(",")[0].casefold() for row in rows]
    assert len(words) > 40
    assert words == sorted(set(words))
