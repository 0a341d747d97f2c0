"""The evaluate stage: measures a policy's answers to held-out prompts, and its KL from the initial policy."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

import msgspec

from annotation.config import EvaluationConfig
from annotation.evaluating.diagnostics import agreement, diversity
from annotation.evaluating.estimates import Estimate, clustered, win_share
from annotation.scorers import CONFIGS
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

    The ledger counts samples scored by `reward`; NAME_unscored counts the samples that each scorer left out.
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
        metrics |= _scorer_metrics(name, clustered([_values(found[name]) for _, found in rows]))
        metrics[f"{name}_unscored"] = len(completions) - sum(len(found[name]) for _, found in rows)
    metrics.setdefault("gold_reward_mean", None)
    metrics.setdefault("gold_reward_ci95", None)
    metrics |= _win_rate(config, scores["reward"], rows)
    if config.previous is not None:
        estimate = clustered(_win_shares(scores["reward"], Artifact.open(config.previous, SCORES), rows))
        metrics |= {"win_rate_previous": estimate.mean, "win_rate_previous_ci95": estimate.ci95}
    metrics |= _kl(config, rows)
    metrics |= {
        "response_length": math.fsum(len(completion.response_ids) for completion in completions) / len(completions),
        "stop_rate": sum(completion.finish_reason != "length" for completion in completions) / len(completions),
        "prompts": len(rows),
        "samples": len(completions),
    }
    if config.ensemble:
        metrics |= _uncertainty(rows, config.ensemble)
    if config.diagnostics:
        metrics |= _diagnostics(rows, [name for name in scores if name != "reward"])
    ledger = Ledger("samples")
    ledger.keep(len(completions) - metrics["reward_unscored"])
    ledger.drop("unscored", metrics["reward_unscored"])
    text = msgspec.json.format(msgspec.json.encode(metrics, order="sorted"), indent=1)
    context.publication.scratch(FILE).write_bytes(text + b"\n")
    context.publication.commit(FILE, ledger)
    return Outcome("samples", {"metrics": metrics}, rollouts.manifest.weights)


def _values(scores: ScoresBySample) -> list[float]:
    return [score.score for _, score in sorted(scores.items())]


def _scorer_metrics(name: str, estimate: Estimate) -> dict[str, float | None]:
    """A scorer's metrics: mean and interval for the reward and the gold scorer, the mean for others."""
    if name == "reward":
        return {"reward_mean": estimate.mean, "reward_ci95": estimate.ci95}
    if name == "gold":
        return {"gold_reward_mean": estimate.mean, "gold_reward_ci95": estimate.ci95}
    return {f"{name}_mean": estimate.mean}


def _win_rate(config: EvaluationConfig, rewards: Artifact, rows: list[Row]) -> dict[str, Any]:
    """Mean over prompts of the share of cross pairs in which this policy's answer wins against the baseline's.

    Scores of kinds that compare answers are win probabilities already: the win rate is their mean, provided that they
    were compared with the baseline's answers.
    """
    if config.baseline is None:
        return {"win_rate": 0.5, "win_rate_ci95": 0.0, "win_rate_prompts": len(rows)}
    baseline = Artifact.open(config.baseline, SCORES)
    kind = rewards.manifest.facts.get("kind")
    if kind in CONFIGS and CONFIGS[kind].compares:
        if rewards.manifest.facts.get("against") != baseline.manifest.inputs.get("rollouts"):
            raise UserError(
                f"{rewards.path} are scores of kind={kind}, which say how often an answer beats those that it was "
                f"compared with, and these are not the answers that the baseline {baseline.path} scored. Score with "
                "against=ROLLOUTS of the initial policy."
            )
        found_prompts = [values for _, found in rows if (values := _values(found["reward"]))]
        estimate = clustered(found_prompts)
        return {"win_rate": estimate.mean, "win_rate_ci95": estimate.ci95, "win_rate_prompts": len(found_prompts)}
    shares = _win_shares(rewards, baseline, rows)
    if not shares:
        raise UserError(
            f"baseline {config.baseline} and {config.rollouts} have no scored prompt in common, so there is no win "
            "rate. Score the initial policy on the same held-out prompts."
        )
    estimate = clustered(shares)
    return {"win_rate": estimate.mean, "win_rate_ci95": estimate.ci95, "win_rate_prompts": len(shares)}


def _win_shares(rewards: Artifact, others: Artifact, rows: list[Row]) -> list[list[float]]:
    """For each prompt with scored answers of both policies, the share of cross pairs in which this policy's answer
    wins."""
    _require_same_scorer(rewards, others)
    theirs: dict[str, list[float]] = {}
    for score in others.rows(Score):
        theirs.setdefault(score.prompt_id, []).append(score.score)
    return [
        [win_share(ours, theirs[rollout.prompt_id])]
        for rollout, found in rows
        if (ours := _values(found["reward"])) and rollout.prompt_id in theirs
    ]


def _uncertainty(rows: list[Row], ensemble: list[str]) -> dict[str, float | None]:
    """Standard deviation (n in the denominator) of an ensemble's scores of an answer, averaged over answers."""
    spreads = [
        [
            statistics.pstdev(found[name][sample].score for name in ensemble)
            for sample in sorted(found[ensemble[0]])
            if all(sample in found[name] for name in ensemble)
        ]
        for _, found in rows
    ]
    estimate = clustered(spreads)
    return {"reward_uncertainty": estimate.mean, "reward_uncertainty_ci95": estimate.ci95}


def _diagnostics(rows: list[Row], scorers: Iterable[str]) -> dict[str, Any]:
    """Further metrics for gates and for detecting reward hacking: intervals, diversity and scorer agreement."""
    answers = [rollout.completions for rollout, _ in rows]
    lengths = clustered([[len(answer.response_ids) for answer in given] for given in answers])
    stops = clustered([[float(answer.finish_reason != "length") for answer in given] for given in answers])
    metrics: dict[str, Any] = {"response_length_ci95": lengths.ci95, "stop_rate_ci95": stops.ci95, **diversity(answers)}
    for name in scorers:
        pairs = [
            [
                (score.score, found[name][sample].score)
                for sample, score in found["reward"].items()
                if sample in found[name]
            ]
            for _, found in rows
        ]
        metrics |= dict(
            zip((f"spearman_{name}", f"kendall_{name}", f"kendall_{name}_ci95"), agreement(pairs), strict=True)
        )
    return metrics


def _require_same_scorer(ours: Artifact, theirs: Artifact) -> None:
    if scorer_of(ours) != scorer_of(theirs):
        raise UserError(
            f"{ours.path} and the baseline {theirs.path} were scored by different scorers, so a win rate between them "
            "means nothing. Score both with the same model or function."
        )


def _kl(config: EvaluationConfig, rows: list[Row]) -> dict[str, Any]:
    """KL(policy || initial policy) per response in nats: mean over samples of sum_t (logp_policy - logp_reference).

    The estimate is unbiased only for samples from the policy's own distribution, so it is computed only for plain
    sampling at temperature 1, where "raw" and "processed" log-probabilities are equal.
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
        if changed := sampling.departures():
            return f"sampled with {changed}; the estimate needs samples of the policy's own distribution"
    return None
