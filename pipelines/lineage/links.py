"""What was made from what: the artifacts of a run, and for each link in a manifest where its content is now.

A manifest records the digest of every input and the path that it had. The digest decides. The path helps to find the
content, also in a run that was moved, copied or forked since, and where the driver has set it aside in superseded/.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from contracts.artifacts import Artifact, input_digest
from contracts.errors import UserError
from contracts.fingerprint import MODEL_FILES, digest
from contracts.manifest import MANIFEST, Manifest
from pipelines.run.decisions import SUPERSEDED

RUN = "run.json"


@dataclass(frozen=True)
class Link:
    """One input of an artifact, as its manifest records it."""

    name: str
    """The input's name; of a list with several, NAME[0], NAME[1] and so on."""
    digest: str
    path: str
    """Where it was: absolute, or as the user gave it, or hf:ORG/NAME."""
    read: str
    """When what was made from it was published."""


@dataclass(frozen=True)
class Found:
    """Where the content of a link is now."""

    state: Literal["same", "replaced", "changed", "gone"]
    """same: in its former place; replaced: found by its digest in another place of the run; changed: only other
    content is there; gone: nothing is."""
    link: Link
    place: Path
    """The directory or file that holds it; for `gone`, where it was looked for."""
    artifact: Artifact | None = None
    """The artifact that it is or belongs to, if any."""
    part: str = ""
    """The file or folder within the artifact, if it is not all of it."""
    now: str | None = None
    """The digest of what is in its former place, where that is not the recorded one."""
    inside: bool = True
    """Whether its former place belongs to the run."""
    again: bool = False
    """Whether the same content was made again in its former place, so that `artifact` is the one that was read."""


def links_of(manifest: Manifest) -> list[Link]:
    """The inputs of an artifact, lists written out."""
    links = []
    for name, value in manifest.inputs.items():
        digests, paths = _listed(value), _listed(manifest.input_paths.get(name))
        for number, (item, path) in enumerate(zip(digests, paths, strict=True)):
            links.append(Link(f"{name}[{number}]" if len(digests) > 1 else name, item, str(path), manifest.created))
    return links


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def fingerprint_of(files: dict[str, str]) -> str:
    """`weights_fingerprint` of a model directory from the SHA-256 of its files by name."""
    counted = {name for name in files if "/" not in name and (name.endswith(".safetensors") or name in MODEL_FILES)}
    return digest({name: files[name] for name in counted})


def part_digest(manifest: Manifest, part: str) -> str | None:
    """`input_digest` of an artifact, or of a file or folder in it, from its manifest; None: it holds no such part."""
    if not part:
        return manifest.digest
    files = {file.path: file.sha256 for file in manifest.files}
    if part in files:
        return files[part]
    inside = {name.removeprefix(f"{part}/"): sha256 for name, sha256 in files.items() if name.startswith(f"{part}/")}
    if not inside:
        return None
    return fingerprint_of(inside) if "config.json" in inside else digest(inside)


def model_of(found: Found) -> str | None:
    """The fingerprint by which rows name the model that a link led to; None where that cannot be known any more."""
    if found.state in ("changed", "gone"):
        return None
    if found.artifact is None or found.part:
        return found.link.digest
    manifest = found.artifact.manifest
    return manifest.weights or fingerprint_of({file.path: file.sha256 for file in manifest.files})


def run_of(path: Path) -> Path | None:
    """The run's directory that holds `path`, if any."""
    return next((parent for parent in [path, *path.parents] if (parent / RUN).is_file()), None)


class Index:
    """The artifacts below a directory by their names (paths below it), those in superseded/ included."""

    def __init__(self, path: Path) -> None:
        """Read all manifests below `path`, which is a run's directory or holds artifacts that were made by hand."""
        self.path = path
        self.artifacts: dict[str, Artifact] = {}
        """Those in superseded/ last."""
        self.damaged: dict[str, UserError] = {}
        """Names of the directories whose manifest cannot be read."""
        self._by_digest: dict[str, Artifact] = {}
        self._versions: dict[str, list[Artifact]] = {}
        """What each stage has published: now, and under other keys."""
        names = [directory.relative_to(path).as_posix() for directory in _published(path)]
        for name in sorted(names, key=lambda name: (is_superseded(name), name)):
            try:
                artifact = self.artifacts[name] = Artifact.open(path / name)
            except UserError as error:
                self.damaged[name] = error
                continue
            self._by_digest.setdefault(artifact.manifest.digest, artifact)
            self._versions.setdefault(original_name(name), []).append(artifact)
        self._names = self._versions.keys() | self.artifacts.keys() | self.damaged.keys()
        self._outside: dict[Path, str] = {}
        self._roots = self._former_roots()

    def name_of(self, artifact: Artifact) -> str:
        """What to call an artifact: its place in the run, else its path."""
        if artifact.path == self.path or not artifact.path.is_relative_to(self.path):
            return str(artifact.path)
        return artifact.path.relative_to(self.path).as_posix()

    def find(self, link: Link) -> Found:
        """Where the content of a link is now.

        Raises:
            UserError: what lies at a place outside of the run cannot be read.
        """
        now = None
        inner = self.inner(link.path)
        if inner is not None:
            name, part = inner
            here = self.artifacts.get(name)
            now = part_digest(here.manifest, part) if here else None
            if matching := self._with_part(name, part, link.digest):
                artifact = _version_read(matching, link)
                if now == link.digest:
                    return Found("same", link, artifact.path / part, artifact, part, again=artifact is not here)
                return Found("replaced", link, artifact.path / part, artifact, part, now)
        if link.digest in self._by_digest:
            artifact = self._by_digest[link.digest]
            return Found("replaced", link, artifact.path, artifact, now=now)
        if inner is not None and now is not None:
            return Found("changed", link, self.path / inner[0] / inner[1], self.artifacts[inner[0]], inner[1], now)
        return self._find_outside(link, inner)

    def input_of(self, artifact: Artifact, name: str) -> Found | None:
        """Where the content of an artifact's input is; None where that cannot be known, or there is no such input."""
        for link in links_of(artifact.manifest):
            if link.name == name and not self.is_damaged(link):
                with contextlib.suppress(UserError):
                    found = self.find(link)
                    return found if found.state in ("same", "replaced") else None
        return None

    def _find_outside(self, link: Link, inner: tuple[str, str] | None) -> Found:
        """A link to what no stage of the run has made: a user's file, a model from elsewhere, another run."""
        # What lay in the run has to be in the run, not in a former directory of it that is still there.
        place = Path(link.path) if inner is None else self.path / inner[0] / inner[1]
        if not link.path.startswith("hf:") and not place.exists():
            return Found("gone", link, place, inside=inner is not None)
        if place not in self._outside:
            self._outside[place] = input_digest(link.path if inner is None else place)
        now = self._outside[place]
        artifact = Artifact.open(place) if (place / MANIFEST).is_file() else None
        if now == link.digest:
            return Found("same", link, place, artifact, inside=False)
        return Found("changed", link, place, artifact, now=now, inside=False)

    def is_damaged(self, link: Link) -> bool:
        """Whether a link leads to a place of the run whose manifest cannot be read."""
        inner = self.inner(link.path)
        return inner is not None and inner[0] in self.damaged

    def inner(self, recorded: str) -> tuple[str, str] | None:
        """Name of the artifact, and the part of it, that a recorded path meant; None: it did not lie in the run."""
        path = Path(recorded)
        for root in self._roots:
            if path.is_relative_to(root):
                rest = path.relative_to(root)
                return self._split(rest) or (rest.as_posix(), "")
        return None

    def _split(self, path: Path) -> tuple[str, str] | None:
        """A path below the run as an artifact's name and a part of it."""
        for candidate in [path, *path.parents]:
            if candidate.as_posix() in self._names:
                part = path.relative_to(candidate).as_posix()
                return candidate.as_posix(), "" if part == "." else part
        return None

    def _former_roots(self) -> list[Path]:
        """The directories that this run has been, the present one first.

        A run that was moved or forked has links below its former directory. That is told from those whose content is
        found at the same place below the present one.
        """
        roots = {self.path.absolute(): None}
        for artifact in self.artifacts.values():
            for link in links_of(artifact.manifest):
                path = Path(link.path)
                for cut in range(path.is_absolute(), len(path.parts)):
                    root = Path(*path.parts[:cut])
                    split = None if root in roots else self._split(path.relative_to(root))
                    if split and self._with_part(*split, link.digest):
                        roots[root] = None
        return list(roots)

    def _with_part(self, name: str, part: str, wanted: str) -> list[Artifact]:
        """What a stage has published, now and under other keys, that has this content in a part of it."""
        return [found for found in self._versions.get(name, []) if part_digest(found.manifest, part) == wanted]


def _version_read(versions: list[Artifact], link: Link) -> Artifact:
    """Of several artifacts with the content of a link the one that was read, which is not younger than its reader."""
    earlier = [version for version in versions if version.manifest.created <= link.read]
    return max(earlier or versions, key=lambda version: version.manifest.created)


def is_superseded(name: str) -> bool:
    """Whether an artifact's name says that it was set aside."""
    return original_name(name) != name


def original_name(name: str) -> str:
    """The stage of an artifact: superseded/STAGE/KEY is of STAGE."""
    path = Path(name)
    return path.relative_to(SUPERSEDED).parent.as_posix() if path.parts[:1] == (SUPERSEDED,) else name


def _published(path: Path) -> Iterator[Path]:
    """Directories with a manifest, outside of logs and of what is being made; nothing is published inside another."""
    for folder, subfolders, files in os.walk(path):
        if MANIFEST in files:
            subfolders.clear()
            yield Path(folder)
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "logs"]
