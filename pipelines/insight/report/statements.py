"""Writes the statements of a report: did it learn, did it hack length, what was dropped, where did the time go."""

import math
from collections.abc import Collection
from typing import Any

from pipelines.insight.report.data import LedgerLine, RunReport, Statement
from pipelines.insight.report.length import HELD_OUT, TRAINED_ON, length_statement
from pipelines.run.metrics import mean_with_interval, ranking_metric
from pipelines.text import format_ranges, plural

LOADING_SHARE = 0.2
"""Share of the stages' time spent on loading from which `executor.warm` is recommended."""
IDLE_SHARE = 0.5
"""Share of the time from which idle devices, and waiting for them, are mentioned."""
UNUSUAL_SHARE = 0.5
"""Share of the stages' time from which loading or waiting counts as unusual."""
INTENDED_REASONS = ("beyond_per_prompt", "not_drawn", "not_selected")
"""Drop reasons that are intended: the stage was configured to select a part of its rows."""


def statements(report: RunReport) -> list[Statement]:
    """All statements of a report, in the order of the page."""
    learning, length = _learning(report), length_statement(report)
    if learning.tone == "good" and length.tone == "bad":
        learning.tone, learning.answer = "unclear", learning.answer.replace("Yes.", "By its reward, yes.", 1)
        learning.details.insert(0, "But length may be all that it learned: see the next answer.")
    return [*_failure(report), learning, length, dropped_statement(report), _time(report), *_signal(report)]


def _failure(report: RunReport) -> list[Statement]:
    failed = [row for row in report.stages if row.state == "failed"]
    if not failed:
        return []
    failures = [f"{row.name} failed: {row.detail.rstrip('.') or 'without a message'}." for row in failed]
    details = [*failures[1:6], f"`pipeline logs {report.path} {failed[0].name}` shows the end of its log."]
    return [Statement(topic="failure", question="What went wrong?", answer=failures[0], details=details, tone="bad")]


def _learning(report: RunReport) -> Statement:
    found = Statement(topic="learning", question="Did it learn?", answer="")
    rows = report.evaluations
    if not rows:
        found.answer, found.tone = "Not known: no evaluation is published yet.", "unclear"
        return found
    first, last = rows[0], rows[-1]
    if len(rows) == 1:
        found.answer = f"Not known yet: only {_policy(first)} has been evaluated ({_with_interval(first, 'reward')})."
        found.tone = "unclear"
        return found
    a, b = first.get("reward_mean"), last.get("reward_mean")
    if a is None or b is None:
        found.answer, found.tone = "Not known: the evaluations have no reward.", "unclear"
        return found
    change = paired_change(report, int(first["iteration"]), int(last["iteration"]))
    if change is not None:
        delta, ci95, prompts = change
        noise = f"{ci95:.2g}" if math.isfinite(ci95) else "an unknown error"
        same = f"by {_signed(delta)} ± {noise} (95 %) on the same {plural(prompts, 'held-out prompt')}"
    else:  # the answers are deleted or damaged: use the two means, each with its own interval
        delta, halves = b - a, (first.get("reward_ci95"), last.get("reward_ci95"))
        ci95 = math.inf if None in halves else math.hypot(*(float(half or 0.0) for half in halves))
        same = f"by {_signed(delta)}" + (f" ± {ci95:.2g} (95 %)" if math.isfinite(ci95) else ", with an unknown error")
    span = f"from {a:.3g} to {b:.3g}"
    over = f"over {plural(int(last['iteration']) - int(first['iteration']), 'iteration')}"
    if delta - ci95 > 0:
        found.answer, found.tone = f"Yes. The held-out reward rose {span} {over}, {same}.", "good"
    elif delta + ci95 < 0:
        found.answer, found.tone = f"No, it got worse. The held-out reward fell {span} {over}, {same}.", "bad"
    else:
        found.answer = f"Not measurably. The held-out reward went {span} {over}, {same}: within its noise."
        found.tone = "unclear"
    stopped = [f"{report.stopped[:1].upper()}{report.stopped[1:]}"] if report.stopped else []
    found.details = [
        *stopped,
        *_gold_and_win_rate(first, last),
        *_best(rows, report.refused),
        *_policy_kl(last),
        *_lag(report),
    ]
    return found


def paired_change(report: RunReport, first: int, last: int) -> tuple[float, float, int] | None:
    """Change of the mean reward on the same held-out prompts, half its 95 % interval, and the number of prompts."""
    sets = {found.iteration: found for found in report.sets if found.role == HELD_OUT}
    if first not in sets or last not in sets:
        return None
    before = dict(zip(sets[first].columns.prompt, sets[first].columns.mean, strict=True))
    differences = [
        now - was
        for prompt, now in zip(sets[last].columns.prompt, sets[last].columns.mean, strict=True)
        if now is not None and (was := before.get(prompt)) is not None
    ]
    return (*mean_with_interval(differences), len(differences)) if differences else None


def _gold_and_win_rate(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    lines = []
    if first.get("gold_reward_mean") is not None and last.get("gold_reward_mean") is not None:
        gold = last["gold_reward_mean"] - first["gold_reward_mean"]
        noise = math.hypot(first.get("gold_reward_ci95") or 0.0, last.get("gold_reward_ci95") or 0.0)
        reward = (last.get("reward_mean") or 0.0) - (first.get("reward_mean") or 0.0)
        span = f"from {first['gold_reward_mean']:.3g} to {last['gold_reward_mean']:.3g}"
        if gold > noise:
            lines.append(f"The gold reward, which training never sees, rose too: {span}.")
        elif gold < -noise and reward > 0:
            lines.append(f"But the gold reward, which training never sees, fell {span}: the reward is being gamed.")
        else:
            lines.append(f"The gold reward, which training never sees, went {span}: no clear change.")
    if last.get("win_rate") is not None:
        lines.append(f"Its answers win {100 * last['win_rate']:.0f} % of comparisons with those of the initial policy.")
    return lines


def _best(rows: list[dict[str, Any]], refused: Collection[int]) -> list[str]:
    metric = ranking_metric(rows[0])
    known = [row for row in rows if row.get(metric) is not None and row["iteration"] not in refused]
    best = max(known, key=lambda row: float(row[metric]), default=None)
    if best is None:
        return []
    name = "gold reward" if metric.startswith("gold") else "reward"
    among = f", leaving out those that a gate has refused (iteration {format_ranges(refused)})," if refused else ""
    return [f"The best checkpoint by {name}{among} is {_policy(best)}."]


def _policy_kl(last: dict[str, Any]) -> list[str]:
    if last.get("kl") is None:
        reason = last.get("kl_reason")
        return [f"How far the policy has moved (KL) is not estimated: {reason}."] if reason else []
    return [f"The policy has moved {last['kl']:.2g} nats per answer from the initial one (KL)."]


def _lag(report: RunReport) -> list[str]:
    if not (lag := report.config_of.get("lag")):
        return []
    older = plural(lag, "iteration")
    return [
        f"It was trained with lag={lag}: on answers of a policy that is {older} older than the one that is trained."
    ]


def dropped_statement(report: RunReport) -> Statement:
    """The rows that stages have dropped, without intended drops."""
    found = Statement(topic="dropped", question="What was dropped?", answer="")
    lines = [line for line in report.ledgers if _unintended_drops(line)]
    if not report.ledgers:
        found.answer, found.tone = "Not known: nothing is published yet.", "unclear"
        return found
    if not lines:
        found.answer, found.tone = "Nothing: every stage has kept all of its rows.", "good"
        return found
    worst = max(lines, key=_share)
    found.tone = "bad" if _share(worst) > 0.5 else "unclear" if _share(worst) > 0.1 else "good"
    much = {"good": "Little", "unclear": "Some", "bad": "Much"}[found.tone]
    found.answer = f"{much}. The largest share was dropped by {_dropped_sentence(worst)}."
    found.details = [f"{_dropped_sentence(line)}." for line in sorted(lines, key=_share, reverse=True)[1:6]]
    if len(lines) > 6:
        found.details.append(f"and {len(lines) - 6} further stages: see the funnel")
    return found


def _share(line: LedgerLine) -> float:
    return sum(_unintended_drops(line).values()) / line.rows_in if line.rows_in else 0.0


def _unintended_drops(line: LedgerLine) -> dict[str, int]:
    """A stage's dropped rows by reason, without those of intended reasons."""
    return {reason: count for reason, count in line.dropped.items() if reason not in INTENDED_REASONS}


def _dropped_sentence(line: LedgerLine) -> str:
    reasons = sorted(_unintended_drops(line).items(), key=lambda item: -item[1])
    by_reason = ", ".join(f"{reason.replace('_', ' ')} {count}" for reason, count in reasons)
    lost = f"{sum(_unintended_drops(line).values())} of {line.rows_in} {line.unit} ({100 * _share(line):.2g} %)"
    return f"{line.stage}: {lost}, by reason: {by_reason}"


def _time(report: RunReport) -> Statement:
    found = Statement(topic="time", question="Where did the time go?", answer="")
    facts = report.time
    if not facts.stages:
        found.answer, found.tone = "Not known: this run has not completed a stage yet.", "unclear"
        return found
    total = facts.stages
    shares = {"loading": facts.load, "computing": facts.compute, "waiting": facts.wait, "other": facts.other}
    most = max(shares, key=lambda name: shares[name])
    role, seconds = next(iter(facts.by_role.items()))
    wall = f"{duration(facts.wall)} of wall-clock time, " if facts.wall else ""
    found.answer = (
        f"{wall}{duration(total)} of stages: {100 * shares[most] / total:.0f} % of it {most}. "
        f"Of all roles, {role} took longest ({100 * seconds / total:.0f} %)."
    )
    found.tone = "unclear" if max(facts.load, facts.wait) > UNUSUAL_SHARE * total else "plain"
    found.details = [", ".join(f"{name} {duration(value)}" for name, value in shares.items() if value >= 0.05) + "."]
    if most == "loading":
        found.details.append(
            "The bottleneck is starting: importing libraries and loading models took longer than the work itself, so "
            "more prompts per iteration would take little additional time."
        )
    elif most == "waiting":
        found.details.append(
            "The bottleneck is the time before a stage begins: a scheduler's queue, or starting its process."
        )
    else:
        found.details.append(f"The bottleneck is {role}.")
    if facts.wall and facts.stages > 1.05 * facts.wall:
        found.details.append(f"On average {facts.stages / facts.wall:.1f} stages ran at the same time.")
    speeds = ", ".join(
        f"{name} {float(f'{facts.tokens_per_second[name]:.3g}'):,.0f}"
        for name in (TRAINED_ON, "training")
        if name in facts.tokens_per_second
    )
    found.details += _possible_savings(report)
    found.details.append(
        f"{facts.device_hours:.3g} device-hours" + (f"; tokens per second of computing: {speeds}." if speeds else ".")
    )
    return found


def _possible_savings(report: RunReport) -> list[str]:
    """Sentences on time that other settings would save: loading, idle devices, and waiting for devices."""
    facts, found = report.time, []
    if facts.load > LOADING_SHARE * facts.stages and not (report.config_of.get("executor") or {}).get("warm"):
        share = 100 * facts.load / facts.stages
        found.append(
            f"{share:.0f} % of the stages' time, {duration(facts.load)}, went into importing and loading, in every "
            "stage again: executor.warm=true keeps processes from stage to stage."
        )
    for pool, idle in facts.idle.items():
        if idle > IDLE_SHARE:
            name = f"The devices of the pool {pool}" if pool else "The devices"
            found.append(
                f"{name} were idle for {100 * idle:.0f} % of the time: `pipeline plan show` shows what waits for what; "
                "a lag (docs/lag.md), pools of other sizes or another strategy may use them."
            )
    if facts.held > IDLE_SHARE * facts.stages:
        found.append(f"Stages with all inputs waited {duration(facts.held)} in total for devices in use by others.")
    return found


def _signal(report: RunReport) -> list[Statement]:
    trained = [one for one in report.sets if one.role == TRAINED_ON and one.groups_scored]
    if not trained:
        return []
    last = trained[-1]
    share = last.groups_with_gradient / last.groups_scored
    found = Statement(topic="signal", question="Is there something to learn from?", answer="")
    found.tone = "good" if share > 0.5 else "unclear" if share > 0.1 else "bad"
    which = f"In iteration {last.iteration}, "
    if last.groups_with_gradient == last.groups_scored:
        found.answer = f"{which}every prompt has answers with different scores."
    else:
        different = f"{100 * share:.3g} % of the prompts have answers with different scores"
        found.answer = f"{which}{different}; the others carry no gradient."
    for stage, accuracy in report.held_out_accuracy.items():
        found.details.append(f"The reward model ({stage}) is right about {100 * accuracy:.0f} % of held-out pairs.")
    gaps = [one for one in report.sets if one.gap is not None]
    if gaps:
        found.details.append(
            f"Engine and trainer differ by {gaps[-1].gap:.2g} nats per token on average for the same weights "
            f"({gaps[-1].gap_tokens} tokens of {gaps[-1].name})."
        )
    return [found]


def _policy(row: dict[str, Any]) -> str:
    iteration = int(row["iteration"])
    return "the initial policy" if iteration == 0 else f"the policy of iteration {iteration}"


def _with_interval(row: dict[str, Any], name: str) -> str:
    mean, ci95 = row.get(f"{name}_mean"), row.get(f"{name}_ci95")
    if mean is None:
        return f"no {name}"
    return f"{name} {mean:.3g}" + (f" ± {ci95:.2g}" if ci95 is not None else "")


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def duration(seconds: float) -> str:
    """A time span in words, rounded."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
