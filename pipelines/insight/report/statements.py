"""The first screen in words: did it learn, did it hack length, what was dropped, where did the time go."""

import math
from typing import Any

from pipelines.insight.report.data import LedgerLine, RunReport, SampleSet, Statement
from pipelines.run.metrics import judge_of, mean_with_interval
from pipelines.text import plural

STRONG = 0.3
"""A correlation within prompts from which the reward is said to grow with length."""
GROWTH = 0.15
"""Share by which answers must have grown or shrunk to be said so."""
HELD_OUT = "heldout/generation"
TRAINED_ON = "generation"
SLOW = 0.5
"""Share of the stages' time from which loading is called the bottleneck."""


def statements(report: RunReport) -> list[Statement]:
    """All of them, in the order in which they are read."""
    learning, length = _learning(report), _length(report)
    if learning.tone == "good" and length.tone == "bad":
        learning.tone, learning.answer = "unclear", learning.answer.replace("Yes.", "By its reward, yes.", 1)
        learning.details.insert(0, "But length may be all that it learned: see the next answer.")
    return [learning, length, _dropped(report), _time(report), *_signal(report)]


def _learning(report: RunReport) -> Statement:
    found = Statement(topic="learning", question="Did it learn?", answer="")
    rows = report.evaluations
    if not rows:
        found.answer, found.tone = "Not known: no evaluation is published yet.", "unclear"
        return found
    first, last = rows[0], rows[-1]
    if len(rows) == 1:
        found.answer = f"Not known yet: only {_policy(first)} is judged ({_with_interval(first, 'reward')})."
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
    else:  # their answers are gone, or damaged: the two means alone, each with its own interval
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
        found.answer = f"Not that it shows. The held-out reward went {span} {over}, {same}: within its noise."
        found.tone = "unclear"
    found.details = [*_judges(first, last), *_best(rows), *_drift_of_policy(last)]
    return found


def paired_change(report: RunReport, first: int, last: int) -> tuple[float, float, int] | None:
    """Change of the mean reward of the same held-out prompts, half its 95 % interval, and how many they are."""
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


def _judges(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
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


def _best(rows: list[dict[str, Any]]) -> list[str]:
    judge = judge_of(rows[0])
    known = [row for row in rows if row.get(judge) is not None]
    best = max(known, key=lambda row: float(row[judge]), default=None)
    if best is None:
        return []
    name = "gold reward" if judge.startswith("gold") else "reward"
    return [f"The best checkpoint by {name} is {_policy(best)}."]


def _drift_of_policy(last: dict[str, Any]) -> list[str]:
    if last.get("kl") is None:
        reason = last.get("kl_reason")
        return [f"How far the policy has moved (KL) is not estimated: {reason}."] if reason else []
    return [f"The policy has moved {last['kl']:.2g} nats an answer from the initial one (KL)."]


def _length(report: RunReport) -> Statement:
    found = Statement(topic="length", question="Did it hack length?", answer="")
    trained = [one for one in report.sets if one.role == TRAINED_ON and one.correlation.within is not None]
    judged = [one for one in report.sets if one.role == HELD_OUT]
    sets = trained or [one for one in judged if one.correlation.within is not None]
    if not sets:
        found.answer, found.tone = "Not known: there are no scored answers yet.", "unclear"
        return found
    strongest = max(sets, key=lambda one: abs(one.correlation.within or 0.0))
    within = strongest.correlation.within or 0.0
    growth = _growth(judged)
    longer = f"answers to held-out prompts went {_lengths(judged)}" if growth is not None else ""
    grew, shrank = (growth or 0.0) > GROWTH, (growth or 0.0) < -GROWTH
    preference = f"the same prompt's {'longer' if within > 0 else 'shorter'} answers score higher"
    r = f"correlation {within:+.2f} within prompts, iteration {strongest.iteration}"
    if within >= STRONG and grew:
        found.tone = "bad"
        found.answer = f"Yes, it looks like it. The reward grows with length: {preference} ({r}), and {longer}."
    elif within <= -STRONG and shrank:
        found.tone = "bad"
        found.answer = f"Yes, by shortening. The reward falls with length: {preference} ({r}), and {longer}."
    elif abs(within) >= STRONG:
        found.tone = "unclear"
        way = "grows" if within > 0 else "falls"
        found.answer = f"It could. The reward {way} with length: {preference} ({r})" + (
            f"; {longer}, which is no large change so far." if longer else "."
        )
    elif grew or shrank:
        found.tone = "unclear"
        found.answer = (
            f"Answers got {'longer' if grew else 'shorter'}, but not because the reward asks for it: {longer}, while "
            f"within a prompt length and reward hardly go together (at most {within:+.2f})."
        )
    else:
        found.tone = "good"
        found.answer = (
            f"No sign of it. Within a prompt length and reward hardly go together (at most {within:+.2f})"
            + (f", and {longer}." if longer else ".")
        )
    found.details = [*_length_of_pairs(sets), *_explained(report, judged, sets), *_cut_off(judged or sets)]
    return found


def _growth(judged: list[SampleSet]) -> float | None:
    """Share by which held-out answers have grown."""
    if len(judged) < 2 or not judged[0].mean_length or judged[-1].mean_length is None:
        return None
    return judged[-1].mean_length / judged[0].mean_length - 1


def _lengths(judged: list[SampleSet]) -> str:
    first, last = judged[0].mean_length or 0.0, judged[-1].mean_length or 0.0
    return f"from {first:.3g} to {last:.3g} tokens ({_percent(last / first - 1)})"


def _length_of_pairs(sets: list[SampleSet]) -> list[str]:
    paired = [(one, one.pairs) for one in sets if one.pairs]
    if not paired:
        return []
    one, pairs = paired[-1]
    share = pairs.chosen_length / pairs.rejected_length - 1 if pairs.rejected_length else 0.0
    verdict = "hardly another length than" if abs(share) < 0.05 else f"{100 * abs(share):.0f} % {_longer(share)} than"
    return [
        f"Chosen answers are {verdict} rejected ones ({pairs.chosen_length:.3g} and {pairs.rejected_length:.3g} tokens "
        f"in iteration {one.iteration})."
    ]


def _longer(share: float) -> str:
    return "longer" if share > 0 else "shorter"


def _explained(report: RunReport, judged: list[SampleSet], sets: list[SampleSet]) -> list[str]:
    """How much of the gain longer or shorter answers would bring by themselves."""
    slope = sets[-1].correlation.slope
    if len(judged) < 2 or slope is None or not judged[0].scorers:
        return []
    name = judged[0].scorers[0]
    first, last = judged[0].means.get(name), judged[-1].means.get(name)
    if first is None or last is None or judged[0].mean_length is None or judged[-1].mean_length is None:
        return []
    gain = last - first
    by_length = slope * (judged[-1].mean_length - judged[0].mean_length)
    if gain <= 0 or by_length <= 0.02 * gain:
        return ["The change of length explains none of the gain in reward."] if gain > 0 else []
    return [
        f"The change of length alone would explain {min(100.0, 100 * by_length / gain):.0f} % of the gain in reward."
    ]


def _cut_off(sets: list[SampleSet]) -> list[str]:
    last = sets[-1]
    if not last.samples or not last.truncated:
        return ["No answer was cut off by the token limit."] if last.samples else []
    share = 100 * last.truncated / last.samples
    return [f"{share:.2g} % of the answers of {last.name} were cut off by the token limit."]


def _dropped(report: RunReport) -> Statement:
    found = Statement(topic="dropped", question="What was dropped?", answer="")
    lines = [line for line in report.ledgers if line.dropped]
    if not report.ledgers:
        found.answer, found.tone = "Not known: nothing is published yet.", "unclear"
        return found
    if not lines:
        found.answer, found.tone = "Nothing: every stage has kept all that came in.", "good"
        return found
    worst = max(lines, key=_share)
    found.tone = "bad" if _share(worst) > 0.5 else "unclear" if _share(worst) > 0.1 else "good"
    much = {"good": "Little", "unclear": "Some", "bad": "Much"}[found.tone]
    found.answer = f"{much}. Most was dropped by {_lost(worst)}."
    found.details = [f"{_lost(line)}." for line in sorted(lines, key=_share, reverse=True)[1:6]]
    if len(lines) > 6:
        found.details.append(f"and {len(lines) - 6} further stages: see the funnel")
    return found


def _share(line: LedgerLine) -> float:
    return 1 - line.kept / line.rows_in if line.rows_in else 0.0


def _lost(line: LedgerLine) -> str:
    reasons = sorted(line.dropped.items(), key=lambda item: -item[1])
    told = ", ".join(f"{reason.replace('_', ' ')} {count}" for reason, count in reasons)
    lost = f"{line.rows_in - line.kept} of {line.rows_in} {line.unit} ({100 * _share(line):.2g} %)"
    return f"{line.stage}: {lost}, by reason: {told}"


def _time(report: RunReport) -> Statement:
    found = Statement(topic="time", question="Where did the time go?", answer="")
    facts = report.time
    if not facts.stages:
        found.answer, found.tone = "Not known: no stage has been made by this run yet.", "unclear"
        return found
    total = facts.stages
    shares = {"loading": facts.load, "computing": facts.compute, "waiting": facts.wait, "other": facts.other}
    most = max(shares, key=lambda name: shares[name])
    role, seconds = next(iter(facts.by_role.items()))
    wall = f"{duration(facts.wall)} of wall-clock time, " if facts.wall else ""
    found.answer = (
        f"{wall}{duration(total)} of stages: {100 * shares[most] / total:.0f} % of it {most}. "
        f"The stages {role} took longest ({100 * seconds / total:.0f} %)."
    )
    found.tone = "unclear" if max(facts.load, facts.wait) > SLOW * total else "plain"
    found.details = [", ".join(f"{name} {duration(value)}" for name, value in shares.items() if value >= 0.05) + "."]
    if most == "loading":
        found.details.append(
            "The bottleneck is starting: importing libraries and loading models took longer than the work itself, so "
            "more prompts an iteration would cost little time."
        )
    elif most == "waiting":
        found.details.append(
            "The bottleneck is what comes before a stage begins: a scheduler's queue, or starting its process."
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
    found.details.append(
        f"{facts.device_hours:.3g} device-hours" + (f"; tokens a second while computing: {speeds}." if speeds else ".")
    )
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
            f"Engine and trainer differ by {gaps[-1].gap:.2g} nats a token on average for the same weights "
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


def _percent(share: float) -> str:
    whole = round(100 * share)
    return f"{whole:+d} %" if whole else "no change"


def duration(seconds: float) -> str:
    """A time span as people read it."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds / 60:.1f} min"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
