"""The evaluate stage: how good a policy's answers to held-out prompts are, and how far it has moved."""

import math
from collections.abc import Iterable
from typing import Any

import msgspec

from annotation.config import EvaluationConfig
from annotation.estimates import Estimate, clustered, win_share
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.joining import ScoresBySample, join, scorer_of
from contracts.ledger import Ledger
from contracts.records import ROLLOUTS, SCORES, Completion, Rollout, Score
from contracts.stage import Context, Outcome

FILE = "evaluation.json"
REFERENCE = "reference"

Row = tuple[Rollout, dict[str, ScoresBySample]]


def run(config: EvaluationConfig, context: Context) -> Outcome:
    """Publish `evaluation.json`, which is also the manifest's facts["metrics"].

    The ledger counts samples by the scorer `reward`; NAME_unscored counts what each scorer left out.
    """
    rollouts = Artifact.open(config.rollouts, ROLLOUTS)
    scores = {name: Artifact.open(path, SCORES) for name, path in sorted(config.scores.items())}
    columns = dict(scores)
    if config.reference is not None:
        columns[REFERENCE] = Artifact.open(config.reference, SCORES)
    rows = list(join(rollouts, columns))
    completions = [completion for rollout, _ in rows for completion in rollout.completions]
    if not completions:
        raise UserError(f"{config.rollouts} holds no completion, so there is nothing to evaluate.")
    metrics: dict[str, Any] = {"iteration": config.iteration}
    for name in scores:
        metrics |= _named(name, clustered([_values(found[name]) for _, found in rows]))
        metrics[f"{name}_unscored"] = len(completions) - sum(len(found[name]) for _, found in rows)
    metrics.setdefault("gold_reward_mean", None)
    metrics.setdefault("gold_reward_ci95", None)
    metrics |= _win_rate(config, scores["reward"], rows)
    metrics |= _kl(config, rows)
    metrics |= {
        "response_length": math.fsum(len(completion.response_ids) for completion in completions) / len(completions),
        "stop_rate": sum(completion.finish_reason == "stop" for completion in completions) / len(completions),
        "prompts": len(rows),
        "samples": len(completions),
    }
    ledger = Ledger("samples")
    ledger.keep(len(completions) - metrics["reward_unscored"])
    ledger.drop("unscored", metrics["reward_unscored"])
    text = msgspec.json.format(msgspec.json.encode(metrics, order="sorted"), indent=1)
    context.publication.scratch(FILE).write_bytes(text + b"\n")
    context.publication.commit(FILE, ledger)
    return Outcome("samples", {"metrics": metrics}, rollouts.manifest.weights)


def _values(scores: ScoresBySample) -> list[float]:
    return [score.score for _, score in sorted(scores.items())]


def _named(name: str, estimate: Estimate) -> dict[str, float | None]:
    """The reward's and the gold scorer's columns carry an interval; a further scorer has its mean."""
    if name == "reward":
        return {"reward_mean": estimate.mean, "reward_ci95": estimate.ci95}
    if name == "gold":
        return {"gold_reward_mean": estimate.mean, "gold_reward_ci95": estimate.ci95}
    return {f"{name}_mean": estimate.mean}


def _win_rate(config: EvaluationConfig, rewards: Artifact, rows: list[Row]) -> dict[str, Any]:
    """Mean over the prompts of the share of cross pairs that this policy's answers win against the baseline's.

    Scores of the kind pairwise are probabilities to win already: the win rate is their mean, if the answers that they
    were compared with are the baseline's.
    """
    if config.baseline is None:
        return {"win_rate": 0.5, "win_rate_ci95": 0.0, "win_rate_prompts": len(rows)}
    baseline = Artifact.open(config.baseline, SCORES)
    if rewards.manifest.facts.get("kind") == "pairwise":
        if rewards.manifest.facts.get("against") != baseline.manifest.inputs.get("rollouts"):
            raise UserError(
                f"{rewards.path} are scores of kind=pairwise, which say how often an answer beats those that it was "
                f"compared with, and these are not the answers that the baseline {baseline.path} scored. Score with "
                "against=ROLLOUTS of the initial policy."
            )
        found_prompts = [values for _, found in rows if (values := _values(found["reward"]))]
        estimate = clustered(found_prompts)
        return {"win_rate": estimate.mean, "win_rate_ci95": estimate.ci95, "win_rate_prompts": len(found_prompts)}
    _require_same_scorer(rewards, baseline)
    theirs: dict[str, list[float]] = {}
    for score in baseline.rows(Score):
        theirs.setdefault(score.prompt_id, []).append(score.score)
    shares = [
        [win_share(ours, theirs[rollout.prompt_id])]
        for rollout, found in rows
        if (ours := _values(found["reward"])) and rollout.prompt_id in theirs
    ]
    if not shares:
        raise UserError(
            f"baseline {config.baseline} and {config.rollouts} have no scored prompt in common, so there is no win "
            "rate. Score the initial policy on the same held-out prompts."
        )
    estimate = clustered(shares)
    return {"win_rate": estimate.mean, "win_rate_ci95": estimate.ci95, "win_rate_prompts": len(shares)}


def _require_same_scorer(ours: Artifact, theirs: Artifact) -> None:
    if scorer_of(ours) != scorer_of(theirs):
        raise UserError(
            f"{ours.path} and the baseline {theirs.path} were scored by different scorers, so a win rate between them "
            "means nothing. Score both with the same model or function."
        )


def _kl(config: EvaluationConfig, rows: list[Row]) -> dict[str, Any]:
    """KL(policy || initial policy) per response in nats: mean over samples of sum_t (logp_policy - logp_reference).

    That is unbiased for samples of the policy itself, so it exists only for plain sampling at temperature 1. There,
    "raw" and "processed" log-probabilities are the same.
    """
    names = ("kl", "kl_ci95", "kl_reason", "reference_unscored")
    if config.reference is None:
        return dict(zip(names, (0.0, 0.0, None, 0), strict=True))
    unscored = sum(len(rollout.completions) - len(found[REFERENCE]) for rollout, found in rows)
    if reason := _no_kl(completion for rollout, _ in rows for completion in rollout.completions):
        return dict(zip(names, (None, None, reason, unscored), strict=True))
    estimate = clustered(
        [
            [
                math.fsum(completion.logprobs) - found[REFERENCE][completion.sample].score
                for completion in rollout.completions
                if completion.sample in found[REFERENCE]
            ]
            for rollout, found in rows
        ]
    )
    reason = None if estimate.mean is not None else "the reference scored no sample"
    return dict(zip(names, (estimate.mean, estimate.ci95, reason, unscored), strict=True))


def _no_kl(completions: Iterable[Completion]) -> str | None:
    """Why no KL can be estimated from these samples, or None."""
    for completion in completions:
        sampling = completion.sampling
        if sampling is None or len(completion.logprobs) != len(completion.response_ids):
            return "the samples carry no log-probabilities of the policy that made them"
        if (sampling.temperature, sampling.top_p, sampling.top_k) != (1.0, 1.0, 0):
            return (
                f"sampled with temperature={sampling.temperature:g}, top_p={sampling.top_p:g}, "
                f"top_k={sampling.top_k}; the estimate needs temperature 1, top_p 1, top_k 0"
            )
    return None
