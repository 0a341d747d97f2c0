"""Prepares the pages of the documentation site for scripts/docs.sh: README.md and docs/, with links to pages of the
site.

A source file that a page links to becomes a page as well, so that the site is self-contained. Exits with code 1 if a
link is broken, or if the pages and the navigation do not have the same files.
"""

import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = Path("docs")
CONFIG = DOCS / "zensical.toml"
OTHER_PAGES = {Path("README.md"): Path("index.md"), Path("benchmarks/README.md"): Path("benchmarks.md")}
"""Pages outside docs/, with their paths on the site."""
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^(```+|~~~+)")
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".toml": "toml", ".json": "json"}


def main() -> int:
    """Prepare the site in the folder of the first argument, and rebuild its `pages`. Returns the exit code."""
    folder = Path(sys.argv[1])
    pages = folder / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    problems = write_pages(pages)
    listed = set(nav_pages(tomllib.loads((ROOT / CONFIG).read_text())["project"]["nav"]))
    existing = {path.relative_to(pages).as_posix() for path in pages.rglob("*.md")}
    existing = {path for path in existing if not path.startswith("source/")}
    problems += [f"{path} is not in the navigation: add it to nav in {CONFIG}" for path in sorted(existing - listed)]
    problems += [f"{CONFIG} names {path}, which is not a page" for path in sorted(listed - existing)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    shutil.copy(ROOT / CONFIG, folder / "zensical.toml")
    shutil.copytree(ROOT / DOCS / "assets", pages / "assets")
    return 1 if problems else 0


def write_pages(pages: Path) -> list[str]:
    """Write all pages and the files that they link to. Returns the problems found."""
    problems: list[str] = []
    waiting = [path.relative_to(ROOT) for path in sorted((ROOT / DOCS).rglob("*.md"))] + list(OTHER_PAGES)
    done = set(waiting)
    while waiting:
        path = waiting.pop()
        target = pages / site_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not is_page(path):
            copy(path, target)
            continue
        text, linked, wrong = rewrite_links((ROOT / path).read_text(), path)
        target.write_text(text)
        problems += wrong
        waiting += sorted(linked - done)
        done |= linked
    return problems


def is_page(path: Path) -> bool:
    """Whether a file of the repository is a documentation page."""
    return path in OTHER_PAGES or (path.is_relative_to(DOCS) and path.suffix == ".md")


def site_path(path: Path) -> Path:
    """The path on the site of a file of the repository."""
    if path in OTHER_PAGES:
        return OTHER_PAGES[path]
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS)
    return Path("source") / f"{path}.md"


def copy(path: Path, target: Path) -> None:
    """Copy a file that is not a page: files of docs/ unchanged, source files as pages that are excluded from search."""
    if path.is_relative_to(DOCS):
        shutil.copy(ROOT / path, target)
        return
    text, language = (ROOT / path).read_text(), LANGUAGES.get(path.suffix, "text")
    fence = "````" if "```" in text else "```"
    target.write_text(
        f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"
    )


def rewrite_links(text: str, page: Path) -> tuple[str, set[Path], list[str]]:
    """Rewrite a page's links for the site. Returns the text, the repository's files that it links to, and problems."""
    linked: set[Path] = set()
    wrong: list[str] = []

    def replaced(match: re.Match[str]) -> str:
        before, link, anchor, after = match.groups()
        if ":" in link:
            return match[0]
        path = Path(os.path.normpath(page.parent / link))
        if not (ROOT / path).is_file():
            wrong.append(f"{page} links to {link}, which is not a file of the repository")
            return match[0]
        linked.add(path)
        relative = os.path.relpath(site_path(path), site_path(page).parent)
        return f"{before}{relative}{anchor or ''}{after}"

    lines, fence = [], ""
    for line in text.splitlines():
        mark = FENCE.match(line)
        if mark and (not fence or mark[1] == fence):
            fence = "" if fence else mark[1]
        lines.append(line if fence else LINK.sub(replaced, line))
    return "\n".join(lines) + "\n", linked, wrong


def nav_pages(nav: list[Any]) -> Iterator[str]:
    """Yield the pages that a navigation lists."""
    for entry in nav:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from nav_pages(value)


if __name__ == "__main__":
    sys.exit(main())
