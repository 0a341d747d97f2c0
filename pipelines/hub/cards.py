"""Writes the cards (README.md) of the repos on the Hub from manifests. They contain no local paths and no times."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from contracts import yaml_text
from contracts.artifacts import Artifact
from contracts.manifest import Manifest
from pipelines.graph import name_of, sampled_from, tag_of
from pipelines.hub.published_run import PublishedRun, without_directories
from pipelines.run.metrics import COLUMNS, is_further_scorer, ranking_metric
from pipelines.text import plural

IN_CACHE = re.compile(r"/(?:models|datasets)--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(?:/|$)")
"""A path in the download cache of the Hub's client."""
REFERENCES = {
    "initial": "the initial policy",
    "previous": "the policy that sampled the responses",
    "ema": "a moving average of all policies so far",
}
MARK = "\n<!-- Written by Ratchet. A card that is changed stays as it is then. "
"""Text before the digest at the end of a card; the digest shows whether somebody has edited the card."""
LIMITS = """\
- The figures are those of the scorers above on held-out prompts. The score `reward` is also what the policy was trained
  to raise: it can rise without the answers getting better. Read some answers before you trust it.
- Nothing here says how the model answers other prompts than those, prompts in other languages, or whether it is safe.
- The figures are of one run, without a variance over seeds. Intervals (± 95 %) are over prompts.
"""


def checkpoint_card(published: PublishedRun, repo: str, iteration: int, manifest: Manifest) -> str:
    """The card of a checkpoint."""
    config = manifest.key_parts["config"]
    base, sources = _public_name(published.config.policy), _sources(published)
    algorithm = without_directories(config.get("algorithm", "sft"))
    meta: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if is_on_hub(published.config.policy):
        meta["base_model"] = base.partition("@")[0]
    data = [name.removeprefix("hf:") for name in sources.values() if name.startswith("hf:")]
    data = [re.split("[:@]", name)[0] for name in data] + [name for name in (published.section.pairs,) if name]
    if data:
        meta["datasets"] = sorted(set(data))
    meta["tags"] = ["ratchet", "rlhf", algorithm]
    kind = "The initial policy" if iteration == 0 else f"The policy after iteration {iteration}"
    lines = [
        f"# {published.name}, iteration {iteration}",
        f"{kind} of the run `{published.name}`: iterative online RLHF with Ratchet, by the algorithm `{algorithm}`. "
        "Every iteration has a tag.",
        _code(f"""\
            from transformers import AutoModelForCausalLM, AutoTokenizer

            model = AutoModelForCausalLM.from_pretrained("{repo}", revision="iteration-{iteration}")
            tokenizer = AutoTokenizer.from_pretrained("{repo}", revision="iteration-{iteration}")"""),
        "## Where it comes from",
        _list(_parents(published, iteration, base, sources)),
        "## What it was trained on",
        _list(_trained_on(published, iteration, manifest)),
        "## How it was trained",
        _table(("setting", "value"), _settings(config)),
        *_figures(published, iteration),
        *_dropped(published, iteration),
        "## Limits",
        LIMITS.rstrip(),
        "## Provenance",
        _list(
            [
                f"stage key `{manifest.key}`, content `{manifest.digest}`, weights `{manifest.weights}`",
                f"libraries: {_versions(manifest)}",
                "all of it: `provenance.json`; each step of the training: `training-log.jsonl`",
            ]
        ),
    ]
    return _card(meta, lines)


def pairs_card(published: PublishedRun, repo: str, iteration: int) -> str:
    """The card of the preference pairs of all iterations up to this one."""
    about = (
        "preference pairs: two answers of the policy to a prompt, the better one `chosen`, with both scores and the "
        f"tokens. Each iteration's pairs are made of answers of {_sampling_policies(published.config.lag)}."
    )
    found = [(number, published.find(name_of(number, "pairs"))) for number in range(iteration + 1)]
    ready = [(number, pairs) for number, pairs in found if pairs is not None]
    names = ("margin_mean", "chosen_score_mean", "rejected_score_mean", "chosen_tokens_mean", "rejected_tokens_mean")
    rows = [
        (
            f"iteration_{number}",
            f"{pairs.manifest.rows:,}",
            *(_rounded(pairs.manifest.facts.get(name)) for name in names),
        )
        for number, pairs in ready
    ]
    titles = ("split", "pairs", "margin", "chosen score", "rejected score", "chosen tokens", "rejected tokens")
    settings = ready[-1][1].manifest.key_parts["config"]
    how = ["## How they were chosen", _table(("setting", "value"), _settings(settings))]
    return _data_card(published, repo, iteration, about, [number for number, _ in ready], _table(titles, rows), how)


def rollouts_card(published: PublishedRun, repo: str, iteration: int) -> str:
    """The card of the rollouts of all iterations up to this one."""
    which = (
        "the answers of the policy to those training prompts that it was trained on: prompts whose answers all score "
        "the same were replaced by others"
        if published.selects_rollouts
        else "all answers that the policy gave to the training prompts"
    )
    about = (
        f"{which}. A row is a prompt with its answers "
        "(`completions`), their tokens and log-probabilities under the policy that sampled them, and their `scores`: "
        "for each scorer one number per answer; `score_parts`, where there are any, are the numbers that a score "
        "is composed of."
    )
    found = [(number, published.find(name_of(number, published.rollouts_stage))) for number in range(iteration + 1)]
    ready = [(number, rollouts) for number, rollouts in found if rollouts is not None]
    names = ("completions", "response_tokens", "response_length", "stop_rate")
    rows = [_split(number, rollouts, names) for number, rollouts in ready]
    titles = ("split", "prompts", "answers", "tokens", "tokens per answer", "share that ended before the limit")
    settings = published.artifact(name_of(ready[-1][0], "generation")).manifest.key_parts["config"]
    how = ["## How they were sampled", _table(("setting", "value"), _settings(settings))]
    return _data_card(published, repo, iteration, about, [number for number, _ in ready], _table(titles, rows), how)


def _split(number: int, artifact: Artifact, names: Iterable[str]) -> tuple[str, ...]:
    """A row of the table of splits."""
    facts = (_rounded(artifact.manifest.facts.get(name)) for name in names)
    return f"iteration_{number}", f"{artifact.manifest.rows:,}", *facts


def _data_card(
    published: PublishedRun, repo: str, iteration: int, about: str, splits: list[int], rows: str, how: list[str]
) -> str:
    files = [{"split": f"iteration_{number}", "path": f"data/iteration_{number}.parquet"} for number in splits]
    tags = ["ratchet", "rlhf", *(["preference"] if "preference" in about else [])]
    meta = {"configs": [{"config_name": "default", "data_files": files}], "tags": tags}
    base, sources = _public_name(published.config.policy), _sources(published)
    model = [f"the checkpoints: `{published.section.model}`, with the same tags"] if published.section.model else []
    lines = [
        f"# {repo.partition('/')[2]}",
        f"From the run `{published.name}` (iterative online RLHF with Ratchet): {about}",
        _code(f"""\
            from datasets import load_dataset

            rows = load_dataset("{repo}", split="iteration_{splits[-1]}")"""),
        "## Splits",
        rows,
        "## Where they come from",
        _list([f"initial policy: {_formatted(base)}", *(f"{n}: {_formatted(s)}" for n, s in sources.items()), *model]),
        *how,
        *_figures(published, iteration),
        *_dropped(published, iteration),
        "## Limits",
        "- The answers are a model's, unread by people: they may be wrong, offensive or nonsense.\n"
        "- The scores are those of the scorers named above, with all their mistakes; no person has checked them.\n"
        "- The licence of the prompts applies to this data set, and so does any personal data in them.",
        "## Provenance",
        "`provenance/` has the keys, digests, settings and library versions of every split.",
    ]
    return _card(meta, lines)


def is_on_hub(model: str) -> bool:
    """Whether a model or data set comes from the Hub."""
    return model.startswith("hf:") or IN_CACHE.search(model) is not None


def _public_name(model: str) -> str:
    """The public name of a model or data set, without local directories."""
    if found := IN_CACHE.search(model):
        return f"{found[1]}/{found[2]}@{found[3]}"
    if model.startswith(("hf:", "world:")):
        return model.removeprefix("hf:")
    return f"{Path(model).name} (a local path)"


def _sources(published: PublishedRun) -> dict[str, str]:
    """The sources of prompts and demonstrations by purpose; those on the Hub begin with hf:."""
    config = published.config
    prompts = config.prompts
    found = {
        "training prompts" + (f" ({name})" if prompts.mixture else ""): str(section.source)
        for name, section in prompts.sources.items()
    }
    found["held-out prompts"] = str(prompts.heldout.source)
    if config.sft is not None:
        found["demonstrations"] = str(config.sft.demonstrations)
    if config.offline is not None:
        found["offline pairs"] = str(config.offline.source)
    if config.reward_model is not None:
        found["prompts of the reward model"] = str(config.reward_model.prompts.source)
    return {name: source if source.startswith("hf:") else _public_name(source) for name, source in found.items()}


def _formatted(name: str) -> str:
    name = name.removeprefix("hf:")
    return f"{name.removeprefix('world:')} of the toy task" if name.startswith("world:") else f"`{name}`"


def _parents(published: PublishedRun, iteration: int, base: str, sources: dict[str, str]) -> Iterator[str]:
    config = published.config
    if iteration:
        decided = published.gate_decision(iteration - 1)
        start = decided.start if decided is not None else iteration - 1
        before = "the initial policy" if start == 0 or config.start == "initial" else f"`{tag_of(start)}`"
        yield f"trained from {before}, and held close to {REFERENCES[config.reference]}"
    made = " (fine-tuned on demonstrations first)" if config.sft is not None else ""
    yield f"initial policy: {_formatted(base)}{made}"
    for name, source in sources.items():
        yield f"{name}: {_formatted(source)}"
    for name, scorer in config.scorers.items():
        source = (
            _formatted(_public_name(str(scorer.model_path)))
            if scorer.model_path
            else f"`{without_directories(scorer.display_name)}`"
            if scorer.display_name != scorer.kind
            else ""
        )
        own = name == config.trained_scorer
        yield f"scorer `{name}` ({scorer.kind}): {'trained in this run' if own else source}"


def _sampler(iteration: int, lag: int) -> str:
    """The policy that sampled an iteration's responses."""
    if not lag:
        return "the policy before"
    number = sampled_from(iteration, lag)
    return f"`{tag_of(number)}`" if number else "the initial policy"


def _sampling_policies(lag: int) -> str:
    return f"a policy {plural(lag, 'iteration')} older than the one before it" if lag else "the policy before it"


def _trained_on(published: PublishedRun, iteration: int, manifest: Manifest) -> Iterator[str]:
    """The training data of an iteration, in sentences with figures from its stages."""
    ledger = manifest.ledger
    if not iteration:
        yield plural(ledger.kept, ledger.unit.removesuffix("s"))
        return
    for name, artifact in published.stages(iteration):
        facts, settings = artifact.manifest.facts, artifact.manifest.key_parts["config"]
        if name == "generation":
            heat = ", ".join(f"{value:g}" for value in settings["temperatures"])
            whose = _sampler(iteration, published.config.at(iteration).lag)
            yield (
                f"{artifact.manifest.rows:,} prompts with {settings['k']} answers each, which {whose} sampled "
                f"at temperature {heat}: {_rounded(facts.get('response_tokens'))} tokens"
            )
        elif name == "selected/rollouts":
            yield (
                f"{artifact.manifest.rows:,} prompts of these and of further rounds, which replaced prompts whose "
                "answers all score the same"
            )
        elif name == "pairs":
            margin, chosen, rejected = (
                _rounded(facts.get(name)) for name in ("margin_mean", "chosen_tokens_mean", "rejected_tokens_mean")
            )
            yield (
                f"{artifact.manifest.rows:,} pairs of these, chosen by `{settings['strategy']}`; mean margin {margin}, "
                f"mean tokens {chosen} chosen and {rejected} rejected"
            )
        elif name == "experience":
            yield (
                f"{_rounded(facts.get('samples'))} of these answers with their rewards; mean reward "
                f"{_rounded(facts.get('reward_mean'))}, KL penalty {_rounded(facts.get('kl_coefficient')) or 'none'}"
            )
    config = published.config.at(iteration)
    if config.accumulate and iteration > 1:
        yield "and the pairs of all earlier iterations"
    if config.replay is not None and iteration > 1:
        what = "pairs" if config.description.reads == "pairs" else "answers"
        yield f"and a share of the {what} of earlier iterations, {config.replay.decay:g} to the power of their age"
    if config.offline is not None:
        yield f"and offline pairs, {100 * config.offline.share:.3g} % of all pairs"


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in sorted(config.items()):
        if value not in (None, [], {}):
            yield name, f"`{json.dumps(without_directories(value))}`"


def _figures(published: PublishedRun, iteration: int) -> list[str]:
    """The section with the held-out metrics by iteration."""
    rows = list(published.metrics(iteration))
    known = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    known += sorted({name for row in rows for name in row if is_further_scorer(name)})
    titles = ("iteration", *(COLUMNS.get(name, name.removesuffix("_mean")) for name in known))
    table = _table(titles, [(str(row["iteration"]), *(_rounded(row.get(name)) for name in known)) for row in rows])
    best = f"The best so far by `{ranking_metric(rows[0])}`: `{tag_of(published.best(iteration))}`." if rows else ""
    return ["## Figures on held-out prompts", table, *filter(None, [best])]


def _dropped(published: PublishedRun, iteration: int) -> list[str]:
    """The section with the ledgers: the rows that each stage kept, and those that it dropped by reason."""
    stages = [*published.setup(), *((f"iteration {iteration}: {name}", a) for name, a in published.stages(iteration))]
    return ["## What was dropped", _table(("stage", "in", "kept", "dropped"), (_row(*stage) for stage in stages))]


def _row(name: str, artifact: Artifact) -> tuple[str, str, str, str]:
    ledger = artifact.manifest.ledger
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(ledger.dropped.items())) or "nothing"
    return name, plural(ledger.rows_in, ledger.unit.removesuffix("s")), f"{ledger.kept:,}", dropped


def _versions(manifest: Manifest) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(manifest.key_parts["versions"].items()))


def _rounded(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _card(meta: dict[str, Any], parts: list[str]) -> str:
    text = "\n\n".join(parts)
    return _signed(f"---\n{yaml_text.dump(meta)}---\n\n{text}\n")


def is_unedited(card: str) -> bool:
    """Whether a card was written by (any version of) this module and has not been edited since."""
    body, mark, _ = card.rpartition(MARK)
    return bool(mark) and card == _signed(body)


def _signed(body: str) -> str:
    return f"{body}{MARK}{hashlib.sha256(body.encode()).hexdigest()[:16]} -->\n"


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(titles), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(text: str) -> str:
    lines = [line[12:] if line.startswith(" " * 12) else line for line in text.splitlines()]
    return "```python\n" + "\n".join(lines) + "\n```"
