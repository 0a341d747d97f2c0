"""Indexes the artifacts of a run, and finds the inputs that their manifests link to.

A manifest records the digest and the path of every input. The digest decides, and the path is a hint, so that links
also work for artifacts in superseded/ and in runs that were moved, copied or forked since.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from contracts.artifacts import Artifact, input_digest
from contracts.errors import UserError
from contracts.files import exists_or_matches
from contracts.fingerprint import MODEL_FILES, digest
from contracts.manifest import MANIFEST, Manifest
from pipelines.run.decisions import ALTERNATIVES, SUPERSEDED

RUN = "run.json"


@dataclass(frozen=True)
class Link:
    """One input of an artifact, as its manifest records it."""

    name: str
    """The input's name; NAME[0], NAME[1] and so on for elements of a list."""
    digest: str
    path: str
    """The input's path when it was read: absolute, or as the user gave it, or hf:ORG/NAME."""
    read: str
    """Time of publication of the artifact that read it."""


@dataclass(frozen=True)
class ResolvedLink:
    """The present location of the input behind a link."""

    state: Literal["same", "replaced", "changed", "gone", "damaged"]
    """same: at its recorded path; replaced: elsewhere in the run, found by its digest; changed: the recorded path has
    other content; gone: nothing is there; damaged: it cannot be read."""
    link: Link
    place: Path
    """The directory or file that holds it; for `gone`, where it was expected."""
    artifact: Artifact | None = None
    """The artifact that it is or is part of, if any."""
    part: str = ""
    """The file or folder within the artifact, if it is not all of it."""
    now: str | None = None
    """Digest of the present content of its recorded path, if it differs."""
    inside: bool = True
    """Whether its recorded path is in the run."""
    again: bool = False
    """Whether its recorded path now has a newer artifact of the same content; `artifact` is the one that was read."""
    error: str = ""
    """The error, if it cannot be read."""


def links_of(manifest: Manifest) -> list[Link]:
    """The inputs of an artifact, one link for each element of a list."""
    links = []
    for name, value in manifest.inputs.items():
        digests, paths = _listed(value), _listed(manifest.input_paths.get(name))
        for number, (item, path) in enumerate(zip(digests, paths, strict=True)):
            links.append(Link(f"{name}[{number}]" if len(digests) > 1 else name, item, str(path), manifest.created))
    return links


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def fingerprint_of(files: dict[str, str]) -> str:
    """`weights_fingerprint` of a model directory, from the SHA-256 of its files by name."""
    counted = {name for name in files if "/" not in name and (name.endswith(".safetensors") or name in MODEL_FILES)}
    return digest({name: files[name] for name in counted})


def part_digest(manifest: Manifest, part: str) -> str | None:
    """`input_digest` of an artifact, or of a file or folder in it, from its manifest; None if it has no such part."""
    if not part:
        return manifest.digest
    files = {file.path: file.sha256 for file in manifest.files}
    if part in files:
        return files[part]
    inside = {name.removeprefix(f"{part}/"): sha256 for name, sha256 in files.items() if name.startswith(f"{part}/")}
    if not inside:
        return None
    return fingerprint_of(inside) if "config.json" in inside else digest(inside)


def model_of(found: ResolvedLink) -> str | None:
    """The fingerprint that rows record for the model behind a link; None if it can no longer be known."""
    if found.state in ("changed", "gone"):
        return None
    if found.artifact is None or found.part:
        return found.link.digest
    manifest = found.artifact.manifest
    return manifest.weights or fingerprint_of({file.path: file.sha256 for file in manifest.files})


def run_of(path: Path) -> Path | None:
    """The run's directory that contains `path`, if any."""
    return next((parent for parent in [path, *path.parents] if (parent / RUN).is_file()), None)


class Index:
    """The artifacts below a directory by name (path below it), including those in alternatives/ and superseded/."""

    def __init__(self, path: Path) -> None:
        """Read all manifests below `path`, a run's directory or any other that holds artifacts."""
        self.path = path
        self.artifacts: dict[str, Artifact] = {}
        """Artifacts by name; those in alternatives/, then those in superseded/, come last."""
        self.damaged: dict[str, UserError] = {}
        """Errors of directories whose manifest cannot be read, by name."""
        self._by_digest: dict[str, Artifact] = {}
        self._versions: dict[str, list[Artifact]] = {}
        """All outputs of each stage: the present one, and those in superseded/."""
        names = [directory.relative_to(path).as_posix() for directory in _published(path)]
        for name in sorted(names, key=lambda name: (is_superseded(name), is_alternative(name), name)):
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
        """An artifact's path relative to the run; its own path if it is elsewhere."""
        if artifact.path == self.path or not artifact.path.is_relative_to(self.path):
            return str(artifact.path)
        return artifact.path.relative_to(self.path).as_posix()

    def find(self, link: Link) -> ResolvedLink:
        """Find the input behind a link."""
        now = None
        inner = self.inner(link.path)
        if inner is not None:
            name, part = inner
            if name in self.damaged:
                return ResolvedLink("damaged", link, self.path / name, error="its manifest is damaged")
            here = self.artifacts.get(name)
            now = part_digest(here.manifest, part) if here else None
            if matching := self._with_part(name, part, link.digest):
                artifact = _version_read(matching, link)
                if now == link.digest:
                    return ResolvedLink("same", link, artifact.path / part, artifact, part, again=artifact is not here)
                return ResolvedLink("replaced", link, artifact.path / part, artifact, part, now)
        if link.digest in self._by_digest:
            artifact = self._by_digest[link.digest]
            return ResolvedLink("replaced", link, artifact.path, artifact, now=now)
        if inner is not None and now is not None:
            return ResolvedLink(
                "changed", link, self.path / inner[0] / inner[1], self.artifacts[inner[0]], inner[1], now
            )
        try:
            return self._find_outside(link, inner)
        except UserError as error:
            return ResolvedLink("damaged", link, Path(link.path), inside=False, error=str(error))

    def input_of(self, artifact: Artifact, name: str) -> ResolvedLink | None:
        """Find an input of an artifact; None if there is no such input or its content is not found."""
        for link in links_of(artifact.manifest):
            if link.name == name and (found := self.find(link)).state in ("same", "replaced"):
                return found
        return None

    def _find_outside(self, link: Link, inner: tuple[str, str] | None) -> ResolvedLink:
        """Find an input that no stage of the run made: a user's file, a model, an artifact of another run."""
        # An input that was in the run has to be in the run now, not in a former directory of it that still exists.
        place = Path(link.path) if inner is None else self.path / inner[0] / inner[1]
        if not link.path.startswith("hf:") and not exists_or_matches(place):
            return ResolvedLink("gone", link, place, inside=inner is not None)
        if place not in self._outside:
            self._outside[place] = input_digest(link.path if inner is None else place)
        now = self._outside[place]
        artifact = Artifact.open(place) if (place / MANIFEST).is_file() else None
        if now == link.digest:
            return ResolvedLink("same", link, place, artifact, inside=False)
        return ResolvedLink("changed", link, place, artifact, now=now, inside=False)

    def inner(self, recorded: str) -> tuple[str, str] | None:
        """Resolve a recorded path to an artifact's name and a part of it; None if it was not in the run."""
        path = Path(recorded)
        for root in self._roots:
            if path.is_relative_to(root):
                rest = path.relative_to(root)
                return self._split(rest) or (rest.as_posix(), "")
        return None

    def _split(self, path: Path) -> tuple[str, str] | None:
        """Split a path below the run into an artifact's name and a part of it."""
        for candidate in [path, *path.parents]:
            if candidate.as_posix() in self._names:
                part = path.relative_to(candidate).as_posix()
                return candidate.as_posix(), "" if part == "." else part
        return None

    def _former_roots(self) -> list[Path]:
        """The run's directories: the present one, and former ones.

        In a run that was moved or forked, recorded paths lie below its former directory. It is recognised by inputs
        whose content is now at the same relative path.
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
        """The outputs of a stage, now and in superseded/, in which a part has this digest."""
        return [found for found in self._versions.get(name, []) if part_digest(found.manifest, part) == wanted]


def _version_read(versions: list[Artifact], link: Link) -> Artifact:
    """The artifact that was read, of several with a link's content: the newest that is not newer than its reader."""
    earlier = [version for version in versions if version.manifest.created <= link.read]
    return max(earlier or versions, key=lambda version: version.manifest.created)


def is_superseded(name: str) -> bool:
    """Whether the artifact of this name is in superseded/."""
    return original_name(name) != name


def is_alternative(name: str) -> bool:
    """Whether the artifact of this name is in alternatives/, which no stage of the run reads."""
    return Path(name).parts[:1] == (ALTERNATIVES,)


def original_name(name: str) -> str:
    """The stage of an artifact, by name: superseded/STAGE/KEY belongs to STAGE."""
    path = Path(name)
    return path.relative_to(SUPERSEDED).parent.as_posix() if path.parts[:1] == (SUPERSEDED,) else name


def _published(path: Path) -> Iterator[Path]:
    """Directories with a manifest, except logs and hidden ones; artifacts are not nested."""
    for folder, subfolders, files in os.walk(path):
        if MANIFEST in files:
            subfolders.clear()
            yield Path(folder)
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "logs"]
