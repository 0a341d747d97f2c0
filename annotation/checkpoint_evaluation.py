"""The evaluate-checkpoint stage: a function of the user's own on a checkpoint. Needs no torch."""

import math
import shutil
import traceback
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import msgspec

from annotation.config import CheckpointEvaluationConfig
from contracts import stopping
from contracts.callables import load_callable
from contracts.errors import UserError, as_user_error, is_transient
from contracts.files import write_atomically
from contracts.ledger import Ledger
from contracts.publication import Publication
from contracts.stage import Context, Outcome

UNIT = "evaluations"
METRICS_FILE = "evaluation.json"
FILES = "files"
"""Folder of what the function has written."""


def run(config: CheckpointEvaluationConfig, context: Context) -> Outcome:
    """Publish `evaluation.json`, which is also the manifest's facts["metrics"], and what the function has written.

    A kill while files are published loses nothing: then the function has returned, and is not called again.
    """
    publication = context.publication
    output, returned = publication.state / FILES, publication.state / METRICS_FILE
    if not returned.exists():
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        with context.timed("load"):
            function = load_callable(config.function)
        with context.timed("compute"):
            metrics = _evaluate(function, config, output)
        write_atomically(returned, msgspec.json.format(msgspec.json.encode(metrics, order="sorted"), indent=1) + b"\n")
    with context.timed("save"):
        for path in sorted(output.rglob("*")):
            if path.is_file():
                _publish(publication, path, f"{FILES}/{path.relative_to(output).as_posix()}", Ledger(UNIT))
        ledger = Ledger(UNIT)
        ledger.keep()
        _publish(publication, returned, METRICS_FILE, ledger)
    return Outcome(UNIT, {"metrics": msgspec.json.decode((publication.directory / METRICS_FILE).read_bytes())})


def _publish(publication: Publication, path: Path, name: str, ledger: Ledger) -> None:
    shutil.copyfile(path, publication.scratch(name))  # also where it is a link
    publication.commit(name, ledger)


def _evaluate(function: Any, config: CheckpointEvaluationConfig, output: Path) -> dict[str, float]:
    """What the function returns.

    Raises:
        UserError: it fails, or returns anything but metrics.
    """
    what = f"function {config.function!r}"
    try:
        found = function(config.checkpoint, output, **config.keywords)
    except stopping.Stopped:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, Exception) and (is_transient(error) or as_user_error(error)):
            raise
        traceback.print_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{what} failed on {config.checkpoint}: {type(error).__name__}: {error} ({place.filename}, line "
            f"{place.lineno}). The log has its traceback."
        ) from error
    if not isinstance(found, Mapping):
        raise UserError(f"{what} returned {found!r:.80}; it must return its metrics, numbers by name: {{'acc': 0.5}}.")
    for name, value in found.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            raise UserError(f"{what} returned a metric named {name!r:.80}; a name must be printable text.")
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(f"{what} returned {value!r:.80} for {name!r}; a metric must be a finite number.")
    return {name: float(value) for name, value in found.items()}
