"""The gate stage: publishes the decision on how a run continues after an iteration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from annotation.gating.config import GateConfig
from annotation.gating.decision import FILE, GateDecision, Measured, decide
from contracts.artifacts import Artifact
from contracts.ledger import Ledger
from contracts.records import CHECKPOINT_EVALUATION, EVALUATION, GATE
from contracts.stage import Context, Outcome


def run(config: GateConfig, context: Context) -> Outcome:
    """Publish `gate.json`, which is also the manifest's facts["gate"]."""
    decision = decision_of(config)
    ledger = Ledger("gates")
    ledger.keep(sum(held is not None for held in decision.holds.values()))
    unasked = sum(not config.is_measured(gate) for gate in config.conditions.values())
    ledger.drop("metric not known", sum(held is None for held in decision.holds.values()) - unasked)
    ledger.drop("not evaluated", unasked)
    text = msgspec.json.format(msgspec.json.encode(decision), indent=1)
    context.publication.scratch(FILE).write_bytes(text + b"\n")
    context.publication.commit(FILE, ledger)
    return Outcome("gates", {"gate": msgspec.to_builtins(decision)}, None, note=decision.reason or "")


def decision_of(config: GateConfig) -> GateDecision:
    """The decision, computed from the published evaluations and the previous decision."""
    initial = Measured.of(_metrics(config.initial, config.initial_evaluations), config)
    now = Measured.of(_metrics(config.evaluation, config.evaluations), config)
    earlier = None
    if config.earlier is not None:
        earlier = msgspec.convert(Artifact.open(config.earlier, GATE).manifest.facts["gate"], GateDecision)
    return decide(config, initial, now, earlier)


def _metrics(evaluation: Path, own: Mapping[str, Path]) -> dict[str, Any]:
    """All metrics of a policy; those of a user's own evaluation are named NAME/METRIC."""
    found = dict(Artifact.open(evaluation, EVALUATION).manifest.facts["metrics"])
    for name, path in own.items():
        metrics = Artifact.open(path, CHECKPOINT_EVALUATION).manifest.facts["metrics"]
        found |= {f"{name}/{metric}": value for metric, value in metrics.items()}
    return found
