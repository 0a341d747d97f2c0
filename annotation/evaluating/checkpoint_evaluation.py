"""The evaluate-checkpoint stage: calls a user's own function on a checkpoint. Needs no torch."""

import math
import shutil
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import msgspec

from annotation.config import CheckpointEvaluationConfig
from contracts.callables import as_user_mistake, load_callable
from contracts.errors import UserError, did_you_mean
from contracts.files import write_atomically
from contracts.ledger import Ledger
from contracts.publication import Publication
from contracts.stage import Context, Outcome

UNIT = "evaluations"
METRICS_FILE = "evaluation.json"
FILES = "files"
"""Folder of the files that the function writes."""


def run(config: CheckpointEvaluationConfig, context: Context) -> Outcome:
    """Publish `evaluation.json`, which is also the manifest's facts["metrics"], and the files that the function wrote.

    After a kill while files are published, the function is not called again, since it has already returned.
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
    metrics = msgspec.json.decode((publication.directory / METRICS_FILE).read_bytes())
    _require_needed(config, metrics)  # last, so that the results are kept if it fails
    return Outcome(UNIT, {"metrics": metrics})


def _require_needed(config: CheckpointEvaluationConfig, metrics: Mapping[str, float]) -> None:
    for name in config.needed:
        if name not in metrics:
            raise UserError(
                f"function {config.function!r} returned no metric {name!r}, by which a gate decides."
                f"{did_you_mean(name, metrics)} It has returned {', '.join(metrics) or 'none'}. Correct the gate's "
                "metric, or the function."
            )


def _publish(publication: Publication, path: Path, name: str, ledger: Ledger) -> None:
    shutil.copyfile(path, publication.scratch(name))  # follows links
    publication.commit(name, ledger)


def _evaluate(function: Any, config: CheckpointEvaluationConfig, output: Path) -> dict[str, float]:
    """Call the function, and return its metrics.

    Raises:
        UserError: it fails, or returns something other than metrics.
    """
    what = f"function {config.function!r}"
    with as_user_mistake(f"{what} failed on {config.checkpoint}"):
        found = function(config.checkpoint, output, **config.keywords)
    if not isinstance(found, Mapping):
        raise UserError(f"{what} returned {found!r:.80}; it must return its metrics, numbers by name: {{'acc': 0.5}}.")
    for name, value in found.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            raise UserError(f"{what} returned a metric named {name!r:.80}; a name must be printable text.")
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(f"{what} returned {value!r:.80} for {name!r}; a metric must be a finite number.")
    return {name: float(value) for name, value in found.items()}
