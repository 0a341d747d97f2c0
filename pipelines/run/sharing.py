"""Shares published artifacts between runs by hard links, which is safe because published files never change."""

import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.files import write_atomically
from contracts.fingerprint import RELEASED
from contracts.manifest import MANIFEST
from pipelines.graph import Graph
from pipelines.run.decisions import lender_file, superseded_path
from pipelines.run.superseded import TRASH, discard
from pipelines.text import relative_path


class SharedArtifacts:
    """Offers artifacts of other runs for reuse: hard links in this run's superseded/, where a stage with the same key
    finds them."""

    def __init__(self, run: Path, graph: Graph, exclude: Collection[str] = ()) -> None:
        """Offer artifacts for the stages of `graph`, except those in `exclude`, which have to run."""
        self._run = run
        self._nodes = {name: node for name, node in graph.nodes.items() if name not in exclude}
        self._linked: list[Path] = []

    def offer(self, other: Graph) -> None:
        """Link the artifacts that another run has published for the same stages."""
        for name, node in self._nodes.items():
            offered = other.nodes.get(name)
            if offered is None or not (offered.output / MANIFEST).is_file() or (offered.output / RELEASED).exists():
                continue
            place = superseded_path(self._run, node, Artifact.open(offered.output).manifest.key)
            if not place.exists() and not (node.output / MANIFEST).is_file():
                scratch = Path(tempfile.mkdtemp(prefix=TRASH, dir=self._run))  # so that a kill leaves no partial copy
                link(offered.output, scratch / "linked")
                place.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(lender_file(place), str(relative_path(other.directory)).encode(), durable=False)
                os.rename(scratch / "linked", place)
                scratch.rmdir()
                self._linked.append(place)

    def remove_unused(self) -> int:
        """Remove the offered artifacts that no stage reused. Returns the number that were."""
        unused = [place for place in self._linked if place.exists()]
        for place in unused:
            discard(place, self._run)
        return len(self._linked) - len(unused)


def link(source: Path, target: Path) -> None:
    """Hard-link a directory's files to `target`, or copy them if the file system has no hard links."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except FileNotFoundError as error:
            raise UserError(f"{path} was deleted while it was being shared. Run the same command again.") from error
        except OSError:
            shutil.copyfile(path, copy)
