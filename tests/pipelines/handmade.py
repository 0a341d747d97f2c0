"""Builds a finished run that is structured like a real one: two iterations, without any model, in an instant."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import yaml

from annotation.config import EvaluationConfig
from annotation.pairing.config import PairsConfig
from annotation.scorers import score_config
from contracts.artifacts import Artifact, input_digest, model_fingerprint
from contracts.config import Role, StageConfig
from contracts.fingerprint import digest, weights_fingerprint
from contracts.ledger import Ledger
from contracts.points import METRICS, Point
from contracts.prompts import PromptsConfig, prompt_id
from contracts.publication import Publication
from contracts.records import (
    CHECKPOINT,
    EVALUATION,
    EXPERIENCE,
    PAIRS,
    PROMPTS,
    ROLLOUTS,
    SCORES,
    Completion,
    ExperienceRow,
    ExperienceSample,
    Message,
    Pair,
    Prompt,
    Rollout,
    Sampling,
    Schema,
    Score,
)
from contracts.stage import _flat, key_parts, stage_key
from generation.config import GenerationConfig
from training.config import CriticConfig, ExperienceConfig, PolicyConfig

VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0", "pyarrow": "26.0.1"}
SHARD = 2
"""Prompts per shard."""

Mutation = Callable[[str, list[Any]], list[Any]]
"""A function from a stage's name and its rows to the rows that it publishes instead."""


class HandmadeRun:
    """A run that `build` creates; its external inputs (prompts, models, rules) lie next to it."""

    def __init__(self, folder: Path, mutate: Mutation = lambda name, rows: rows, *, on_samples: bool = False) -> None:
        self.on_samples = on_samples  # trained by PPO instead of DPO
        self.salt = ""  # another salt gives other weights
        self.questions = 5  # the last two are held out
        self.path = folder / "runs" / "handmade"
        self.source = folder / "prompts.jsonl"
        self.model = folder / "model"
        self.judge = folder / "judge"
        self.rules = folder / "rules.py"
        self.mutate = mutate

    def build(self) -> "HandmadeRun":
        """Publish everything, from the prompts to the last evaluation."""
        self.path.mkdir(parents=True)
        texts = [f"What is {number} and [bold]{number}[/bold]?" for number in range(self.questions)]
        self.source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        for model in (self.model, self.judge):
            if not model.exists():
                write_model(model, model.name)
        self.rules.write_text("def long(*, response, **_):\n    return len(response)\n")
        self.prompts("prompts/heldout", texts[-2:])
        self.prompts("prompts/train", texts[:-2])
        policy = self.model
        self.evaluate(0, policy)
        for iteration in (1, 2):
            policy = self.improve(iteration, policy)
            self.evaluate(iteration, policy)
        settings = {"policy": str(self.model)}
        record = {"config": "../../handmade.yaml", "iterations": 2, "settings": settings}
        (self.path / "run.json").write_text(json.dumps(record))
        (self.path / "config.resolved.yaml").write_text(yaml.safe_dump(settings))
        (self.path / "lock").touch()
        self.write_metrics()
        return self

    def improve(self, iteration: int, policy: Path) -> Path:
        """Publish one iteration. Returns the next policy."""
        here = f"iteration-{iteration:03d}"
        rollouts = self.rollouts(f"{here}/generation", policy, "prompts/train", iteration)
        rewards = self.scores(f"{here}/reward", rollouts, "reward")
        if self.on_samples:
            critic = self.judge if iteration == 1 else self.path / f"iteration-{iteration - 1:03d}/critic"
            reference = self.scores(f"{here}/reference", rollouts, "reference")
            values = self.scores(f"{here}/values", rollouts, "values", critic=critic)
            inputs = {"rewards": rewards, "reference": reference, "values": values}
            experience = self.experience(f"{here}/experience", rollouts, inputs)
            self.checkpoint(f"{here}/critic", CriticConfig, model=critic, experience=experience)
            ppo: dict[str, Any] = {"algorithm": "ppo", "settings": {"clip": 0.1}}
            return self.checkpoint(f"{here}/training", PolicyConfig, model=policy, experience=experience, **ppo)
        pairs = self.pairs(f"{here}/pairs", rollouts, rewards)
        reference = self.scores(f"{here}/reference", rollouts, "reference", pairs)
        data = {"pairs": [pairs], "reference": [reference], "settings": {"beta": 0.2}}
        return self.checkpoint(f"{here}/training", PolicyConfig, model=policy, **data)

    def evaluate(self, iteration: int, policy: Path) -> None:
        """Publish the evaluation of a policy, with its rollouts and scores."""
        here = f"iteration-{iteration:03d}"
        rollouts = self.rollouts(f"{here}/heldout/generation", policy, "prompts/heldout", iteration)
        scores = {name: self.scores(f"{here}/heldout/{name}", rollouts, name) for name in ("reward", "gold")}
        config = EvaluationConfig(
            output=self.path / here / "evaluation", rollouts=rollouts, scores=scores, iteration=iteration
        )
        mean = sum(row.score for row in Artifact.open(scores["reward"]).rows(Score)) / 6
        metrics = {"iteration": iteration, "reward_mean": mean, "kl": None}
        content = {"evaluation.json": json.dumps(metrics, indent=1).encode()}
        publish(config, EVALUATION, {}, content, facts={"metrics": metrics})

    def prompts(self, name: str, texts: list[str]) -> Path:
        """Publish prompts."""
        rows = [Prompt(prompt_id([Message("user", text)]), (Message("user", text),)) for text in texts]
        return publish(
            PromptsConfig(output=self.path / name, source=self.source, limit=len(rows)), PROMPTS, {0: rows}, {}
        )

    def rollouts(self, name: str, policy: Path, prompts: str, iteration: int) -> Path:
        """Publish three random answers per prompt."""
        config = GenerationConfig(
            output=self.path / name, policy=policy, prompts=self.path / prompts, iteration=iteration, k=3, seed=7
        )
        chance = random.Random(name)
        weights = model_fingerprint(policy)
        rows = []
        for prompt in Artifact.open(self.path / prompts).rows(Prompt):
            completions = tuple(answer(chance, sample) for sample in range(3))
            ids = (1, *prompt.messages[0].content.encode())
            rows.append(
                Rollout(prompt.prompt_id, prompt.messages, ids, completions, weights, iteration, "processed", None)
            )
        rows = self.mutate(name, rows)
        shards = {number: rows[start : start + SHARD] for number, start in enumerate(range(0, len(rows), SHARD))}
        return publish(config, ROLLOUTS, shards, {}, weights=weights)

    def scores(
        self, name: str, rollouts: Path, scorer: str, pairs: Path | None = None, critic: Path | None = None
    ) -> Path:
        """Publish random scores of rollouts, or only of the samples that occur in pairs."""
        kinds: dict[str, dict[str, Any]] = {
            "reward": {"kind": "reward_model", "model": self.judge},
            "gold": {"kind": "rule", "function": f"{self.rules}:long"},
            "reference": {"kind": "logprobs", "model": self.model},
            "values": {"kind": "values", "model": critic},
        }
        column = {"reference": "token_logprobs", "values": "token_values"}.get(scorer)
        config = score_config(output=self.path / name, rollouts=rollouts, name=scorer, pairs=pairs, **kinds[scorer])
        chance = random.Random(name)
        wanted = None
        if pairs:
            chosen = list(Artifact.open(pairs).rows(Pair))
            wanted = {(row.prompt_id, sample) for row in chosen for sample in (row.chosen_sample, row.rejected_sample)}
        rows = [
            Score(rollout.prompt_id, completion.sample, chance.random(), **numbers_of(completion, column, chance))
            for rollout in Artifact.open(rollouts).rows(Rollout)
            for completion in rollout.completions
            if wanted is None or (rollout.prompt_id, completion.sample) in wanted
        ]
        shards: dict[int, list[Any]] = {}
        places = shard_numbers(Artifact.open(rollouts))
        for row in self.mutate(name, rows):
            shards.setdefault(places.get(row.prompt_id, 0), []).append(row)
        return publish(config, SCORES, shards, {}, facts={"scorer": scorer})

    def pairs(self, name: str, rollouts: Path, scores: Path, margin: float = 0.0) -> Path:
        """Publish the best against the worst answer of every prompt."""
        config = PairsConfig(output=self.path / name, rollouts=rollouts, scores=scores, margin=margin)
        by_sample = {(row.prompt_id, row.sample): row.score for row in Artifact.open(scores).rows(Score)}
        rows = []
        for rollout in Artifact.open(rollouts).rows(Rollout):
            rated = sorted(rollout.completions, key=lambda c: by_sample.get((rollout.prompt_id, c.sample), 0.0))
            rows.append(pair_of(rollout, rated[-1], rated[0], by_sample))
        manifest = Artifact.open(rollouts).manifest
        content = {"train.parquet": random.Random(name).randbytes(50)}
        return publish(config, PAIRS, {0: self.mutate(name, rows)}, content, weights=manifest.weights)

    def experience(self, name: str, rollouts: Path, scores: dict[str, Path]) -> Path:
        """Publish the samples with random advantages and returns."""
        config = ExperienceConfig(output=self.path / name, algorithm="ppo", rollouts=rollouts, **scores)
        found = {
            kind: {(row.prompt_id, row.sample): row for row in Artifact.open(path).rows(Score)}
            for kind, path in scores.items()
        }
        chance = random.Random(name)
        rows = []
        for rollout in Artifact.open(rollouts).rows(Rollout):
            samples = []
            for completion in rollout.completions:
                ids, key = completion.response_ids, (rollout.prompt_id, completion.sample)
                advantages, returns = (tuple(chance.random() for _ in ids) for _ in range(2))
                reference, values = found["reference"].get(key), found["values"].get(key)
                samples.append(
                    ExperienceSample(
                        completion.sample, ids, completion.finish_reason, found["rewards"][key].score,
                        completion.logprobs, advantages, reference.token_logprobs if reference else None,
                        values.token_values if values else None, returns,
                    )
                )  # fmt: skip
            rows.append(
                ExperienceRow(rollout.prompt_id, rollout.prompt_ids, tuple(samples), rollout.policy, rollout.iteration)
            )
        weights = Artifact.open(rollouts).manifest.weights
        return publish(config, EXPERIENCE, {0: self.mutate(name, rows)}, {}, weights=weights)

    def checkpoint(self, name: str, kind: type[CriticConfig | PolicyConfig], **fields: Any) -> Path:
        """Publish a model directory."""
        config = kind(output=self.path / name, seed=11, **fields)
        scratch = self.path / ".model"
        write_model(scratch, name + self.salt)
        content = {file.name: file.read_bytes() for file in scratch.iterdir()}
        weights = weights_fingerprint(scratch)
        for file in scratch.iterdir():
            file.unlink()
        scratch.rmdir()
        (weights,) = self.mutate(f"{name} weights", [weights])
        return publish(config, CHECKPOINT, {}, content, weights=weights, log=[{"step": 1, "loss": 0.69}])

    def write_metrics(self) -> None:
        """Write metrics.jsonl like the driver."""
        points = []
        for iteration in (0, 1, 2):
            name = f"iteration-{iteration:03d}/evaluation"
            manifest = Artifact.open(self.path / name).manifest
            metrics = {f"eval/{name}": value for name, value in manifest.facts["metrics"].items() if value is not None}
            del metrics["eval/iteration"]
            point = Point(
                point=iteration, time=1.0, stage=name, key=manifest.key[:12], unit="stage", number=0,
                iteration=iteration, global_step=iteration, metrics=metrics,
            )  # fmt: skip
            points.append(msgspec.json.encode(point) + b"\n")
        (self.path / METRICS).write_bytes(b"".join(points))


def answer(chance: random.Random, sample: int) -> Completion:
    """A random answer."""
    ids = tuple(chance.randrange(3, 250) for _ in range(chance.randrange(2, 6)))
    logprobs = tuple(-chance.random() for _ in ids)
    return Completion(sample, ids, f"answer {ids}", "length", logprobs, 100 + sample, Sampling(0.9, 1, 0, 8))


def numbers_of(completion: Completion, column: str | None, chance: random.Random) -> dict[str, tuple[float, ...]]:
    """A column with a random number for each token of an answer, or nothing."""
    return {column: tuple(-chance.random() for _ in completion.response_ids)} if column else {}


def pair_of(rollout: Rollout, better: Completion, worse: Completion, scores: dict[tuple[str, int], float]) -> Pair:
    """The pair of two answers."""
    high, low = (scores.get((rollout.prompt_id, completion.sample), 0.0) for completion in (better, worse))
    return Pair(
        pair_id=digest([rollout.prompt_id, rollout.iteration, better.sample, worse.sample])[:16],
        prompt_id=rollout.prompt_id,
        prompt=rollout.messages[-1].content,
        prompt_ids=rollout.prompt_ids,
        chosen_ids=better.response_ids,
        rejected_ids=worse.response_ids,
        chosen=better.text,
        rejected=worse.text,
        chosen_sample=better.sample,
        rejected_sample=worse.sample,
        chosen_finish_reason=better.finish_reason,
        rejected_finish_reason=worse.finish_reason,
        chosen_score=high,
        rejected_score=low,
        margin=high - low,
        strategy="max_min",
        iteration=rollout.iteration,
    )


def shard_numbers(rollouts: Artifact) -> dict[str, int]:
    """The shard numbers of prompts by id."""
    rows = [row.prompt_id for row in rollouts.rows(Rollout)]
    return {name: number // SHARD for number, name in enumerate(rows)}


def publish(
    config: StageConfig,
    schema: Schema,
    shards: dict[int, list[Any]],
    files: dict[str, bytes],
    *,
    log: list[Any] | None = None,
    weights: str | None = None,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Publish rows and files under the stage's key. Returns the directory."""
    parts = key_parts(config, VERSIONS)
    publication = Publication(config.output, schema, config.stage, stage_key(parts))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    publication.begin()
    for number, rows in shards.items():
        ledger = Ledger("rows")
        ledger.keep(len(rows))
        ledger.drop("too_long", number)
        publication.write_rows(f"shard-{number:05d}.jsonl", rows, ledger)
    for name, content in files.items():
        publication.scratch(name).write_bytes(content)
        publication.commit(name, Ledger("rows"))
    if log is not None:
        publication.write_rows("training-log.jsonl", log, Ledger("rows"))
    publication.publish(
        key_parts=parts,
        inputs=parts["inputs"],
        input_paths=json.loads(json.dumps(_flat(config.select(Role.INPUT)), default=str)),
        unit="rows",
        weights=weights,
        versions=VERSIONS,
        seconds={"total": 1.0},
        facts=facts or {},
    )
    assert input_digest(config.output) == Artifact.open(config.output).manifest.digest
    return config.output


def write_model(folder: Path, name: str) -> None:
    """Write a model directory whose weights have the right format, but cannot be loaded as a model."""
    folder.mkdir(exist_ok=True)
    data = random.Random(name).randbytes(64)
    header = json.dumps({"weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    (folder / "config.json").write_text(json.dumps({"architectures": ["None"], "name": name}))
    (folder / "tokenizer.json").write_text("{}")


def compress(shard: Path) -> Path:
    """Replace a file by its compressed form, like `pipeline gc`."""
    packed = shard.with_name(shard.name + ".gz")
    with packed.open("wb") as file, gzip.GzipFile("", "wb", 6, file, mtime=0) as writer:
        writer.write(shard.read_bytes())
    shard.unlink()
    return packed
