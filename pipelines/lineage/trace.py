"""`pipeline trace`: finds the provenance of a checkpoint, pair or prompt: its prompts, seeds, weights and versions."""

import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from contracts.artifacts import Artifact, artifact_of
from contracts.errors import UserError
from contracts.records import CHECKPOINT
from pipelines.lineage.ancestry import ancestry, index_around
from pipelines.lineage.links import RUN, Index, Link, links_of, run_of
from pipelines.lineage.origins import Search
from pipelines.lineage.view import show
from pipelines.run.directory import RunDirectory
from pipelines.text import relative_path

PREFIX = re.compile(r"[0-9a-f]{8,64}")
FORMS = (
    "Give the path of something published (runs/NAME/iteration-001/training), a pair_id or prompt_id (16 hex digits, "
    "as in the pairs and rollouts), or at least 8 digits of a digest, a key, or the fingerprint of weights; "
    "--run RUN says where to look."
)


def print_trace(console: Console, what: str, run: Path | None, *, as_json: bool) -> None:
    """Print the provenance of `what`, as a tree or as one JSON object."""
    found = trace(what, run)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        show(console, found)


def trace(what: str, run: Path | None = None) -> dict[str, Any]:
    """The provenance of something, as plain data with its `kind`: artifact, outside, pair or prompt.

    Args:
        what: path of an artifact or of something in it, the beginning of a digest, a pair_id or a prompt_id.
        run: where to search; by default in every run below ./runs.

    Raises:
        UserError: nothing is known by that name.
    """
    for path in [Path(what).absolute(), *([run.absolute() / what] if run else [])]:
        if path.exists() and (artifact := artifact_of(path)):
            return {"what": what, "kind": "artifact", **ancestry(index_around(artifact.path), artifact)}
    runs = [RunDirectory.existing(run).path] if run else runs_here()
    indexes = [Index(path) for path in runs]
    if PREFIX.fullmatch(what) and (by_digest := _by_digest(indexes, what)):
        return {"what": what, **by_digest, "unread": []}
    unread: list[str] = []
    searches = [Search(index, unread) for index in indexes]
    for kind, search in (("pair", Search.pairs), ("prompt", Search.prompt)):
        if found := [item for one in searches for item in search(one, what)]:
            found_of = {"kind": kind, f"{kind}_id": what, "found": found}
            return {"what": what, **found_of, "unread": list(dict.fromkeys(unread))}
    places = ", ".join(str(relative_path(path)) for path in runs) or "no run: there is none below ./runs"
    hint = " A run is traced by its artifacts." if (Path(what) / RUN).exists() else ""
    gone = f" These could not be read: {', '.join(dict.fromkeys(unread))}." if unread else ""
    raise UserError(f"nothing is known of {what!r}; searched {places}.{gone}{hint} {FORMS}")


def runs_here() -> list[Path]:
    """The run that contains the working directory, if any, and the runs below ./runs."""
    here = run_of(Path.cwd())
    return [*([here] if here else []), *(path.parent for path in sorted(Path("runs").absolute().glob(f"*/{RUN}")))]


def _by_digest(indexes: list[Index], prefix: str) -> dict[str, Any] | None:
    """The artifacts and inputs whose digest, key or (for checkpoints) weights fingerprint begins with `prefix`."""
    found: list[tuple[Index, Artifact]] = []
    outside: dict[str, list[tuple[Link, str]]] = {}
    for index in indexes:
        for artifact in index.artifacts.values():
            manifest = artifact.manifest
            known = [manifest.digest, manifest.key, *([manifest.weights] if manifest.schema == CHECKPOINT else [])]
            if any(text and text.startswith(prefix) for text in known):
                found.append((index, artifact))
            for link in links_of(manifest):
                if link.digest.startswith(prefix):
                    place = f"{link.name} of {relative_path(index.path)}/{index.name_of(artifact)}"
                    outside.setdefault(link.digest, []).append((link, place))
    digests = {artifact.manifest.digest for _, artifact in found} or set(outside)
    if len(digests) > 1:
        names = [str(artifact.path) for _, artifact in found] or [places[0][0].path for places in outside.values()]
        raise UserError(f"{prefix!r} is the beginning of several digests: {', '.join(names)}. Give more digits.")
    if found:
        index, artifact = found[0]
        also = [str(relative_path(other.path)) for _, other in found[1:]]
        return {"kind": "artifact", **ancestry(index, artifact), "also": also}
    for digest, places in outside.items():
        return {
            "kind": "outside",
            "digest": digest,
            "path": places[0][0].path,
            "read_by": [place for _, place in places],
        }
    return None
