"""Ratchet's side of benchmarks/annotation.py: runs the stage `score`, from published rollouts to published scores."""

import json
import sys
from pathlib import Path

from benchmarks.answers import Case, read_cases
from benchmarks.side import Side, cpu_seconds
from benchmarks.workload import Shape


def main(path: str) -> None:
    """Score the cases in turn until no more units are requested."""
    side = Side()
    from contracts import entrypoint

    entrypoint.importing()  # like a stage's process
    from annotation.models.loading import open_model
    from annotation.models.reward_model import RewardModel
    from annotation.scorers import score_config
    from annotation.scorers.base import ModelScoreConfig, Opening
    from annotation.stages.score import SCORE
    from contracts.chat import ChatTokenizer
    from contracts.records import Score
    from contracts.stage import run_stage

    folder = Path(json.loads(Path(path).read_text())["folder"])
    shape = Shape(**json.loads((folder / "model" / "shape.json").read_text()))
    tokenizer = ChatTokenizer(folder / "model")
    cases = read_cases(folder)
    begun = cpu_seconds()
    tokens = {name: _publish(case, shape, tokenizer, folder / name) for name, case in cases.items()}
    published = cpu_seconds() - begun
    keys = {"kind": "reward_model", "model": folder / "model"}
    config = score_config(output=folder / "scores", rollouts=folder / next(iter(cases)), **keys)
    assert isinstance(config, ModelScoreConfig)
    open_model(config, Opening(folder, lambda: 0))  # stays loaded for the stages of this process
    entrypoint.imported()
    setattr(RewardModel, "__call__", side.timed("scoring", RewardModel.__call__))  # noqa: B010 (a method, for mypy)
    side.ready(start_cpu_seconds=cpu_seconds() - published)
    turn = 0
    while True:
        turn += 1
        for name in cases:
            output = folder / f"scores-{name}-{turn}"
            artifact = run_stage(SCORE, score_config(output=output, rollouts=folder / name, **keys))
            scores = [row.score for row in artifact.rows(Score)]
            side.done(scores=scores, tokens=tokens[name], facts=artifact.manifest.facts)


def _publish(case: Case, shape: Shape, tokenizer: "object", target: Path) -> int:
    """Publish a case as rollouts. Returns the number of tokens of its conversations."""
    from contracts.ledger import Ledger
    from contracts.prompts import prompt_id
    from contracts.publication import Publication
    from contracts.records import ROLLOUTS, Completion, Message, Rollout, Sampling

    rows, tokens = [], 0
    for prompt, texts in case.conversations(shape):
        turns = (Message("user", prompt),)
        completions = []
        for sample, text in enumerate(texts):
            completions.append(Completion(sample, (2,), text, "stop", (0.0,), 0, Sampling(1.0, 1.0, 0, 1)))
            tokens += len(tokenizer.conversation([*turns, Message("assistant", text)]))  # type: ignore[attr-defined]
        rows.append(Rollout(prompt_id(turns), turns, (1,), tuple(completions), "policy", 0, "processed", None))
    publication = Publication(target, ROLLOUTS, ROLLOUTS.name, target.name)
    publication.begin()
    ledger = Ledger("prompts")
    ledger.keep(len(rows))
    publication.write_rows("shard-00000.jsonl", rows, ledger)
    publication.publish(
        inputs={}, unit="prompts", key_parts={}, input_paths={}, weights=None, versions={}, seconds={}, facts={}
    )
    return tokens


if __name__ == "__main__":
    main(sys.argv[1])
