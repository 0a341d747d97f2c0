"""Tiny inputs of the training stages: a word-level tokenizer, random Llamas, pairs with reference log-probabilities."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import interrupted_after as interrupted_after
from warm_stages import WarmStage, run_stage_warm, start_stage

from contracts.artifacts import Artifact
from contracts.config import validate
from contracts.declaration import stages_of
from contracts.ledger import Ledger
from contracts.publication import Publication
from contracts.records import PAIRS, SCORES, Pair, Schema, Score
from contracts.stage import run_stage

# Set before any test module imports torch, which reads it once: two threads on shared cores would stall each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[2]
WORDS = "review the film book meal was great good bad awful and blue long .".split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
IDS = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
EOS = IDS["</s>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %} <|user|> {{ message.content }}"
    "{% elif message.role == 'assistant' %} <|assistant|> {{ message.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <|assistant|>{% endif %}"
)


def run_cli(*arguments: Any, check: bool = True, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a process forked from one that has imported the libraries."""
    result = run_stage_warm("training", *arguments, environment=environment, libraries=["deepspeed"])
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def run_here(stage: str, **settings: Any) -> Artifact:
    """Run a stage in this process, for tests that need no separate process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    command = stages_of("training")[stage]
    return run_stage(command, validate(command.config, settings, "test"))


DEADLINE = 240.0


class RunningTraining:
    """A training in other processes, all of which have ended when the test is over."""

    def __init__(self, folder: Path, settings: dict[str, Any], *, fresh: bool, **variables: str) -> None:
        """Start it.

        Args:
            fresh: start a new process, which imports the libraries; otherwise it is forked.
        """
        self.output = Path(settings["output"])
        self.attempt = folder
        folder.mkdir()
        (folder / "stage.json").write_text(json.dumps(settings, default=str))
        arguments = ["policy", "--config", str(folder / "stage.json")]
        variables["RATCHET_ATTEMPT"] = str(folder)
        self.process: WarmStage | subprocess.Popen[bytes]
        with (folder / "log").open("w+b") as log:
            if fresh:
                command = [sys.executable, "-m", "training", *arguments]
                environment = {**os.environ, **variables}
                self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            else:
                libraries = ["deepspeed"]
                self.process = start_stage("training", *arguments, environment=variables, libraries=libraries, log=log)

    @property
    def steps(self) -> int:
        """The number of optimizer steps according to progress.json."""
        path = self.attempt / "progress.json"
        return int(json.loads(path.read_text())["done"]) if path.exists() else 0

    def wait_for(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert self.process.poll() is None, (self.attempt / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> int:
        """Wait for its end, check that it leaves no process behind, and return its exit code."""
        code = self.process.wait(DEADLINE)
        deadline = time.monotonic() + 200
        while left := self.processes():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        return code

    def processes(self, name: str = "") -> list[int]:
        """Its running processes, or the one of this name: those that write to its log or have its variables."""
        log, attempt = str(self.attempt / "log"), f"RATCHET_ATTEMPT={self.attempt}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                outputs = [os.readlink(folder / "fd" / number) for number in "12"]
                ours = log in outputs or attempt in (folder / "environ").read_bytes().split(b"\0")
                if ours and name in ("", (folder / "comm").read_text().strip()):
                    found.append(int(folder.name))
            except OSError:  # it has just ended
                continue
        return found

    def failures(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in self.attempt.glob("failure-*.json")]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RunningTraining]]:
    started: list[RunningTraining] = []

    def begin(
        settings: dict[str, Any], variables: dict[str, str] | None = None, fresh: bool = False, **changes: Any
    ) -> RunningTraining:
        folder = tmp_path / f"attempt-{len(started)}"
        started.append(RunningTraining(folder, {**settings, **changes}, fresh=fresh, **(variables or {})))
        return started[-1]

    yield begin
    for training_process in started:
        training_process.process.send_signal(signal.SIGKILL)
        training_process.end()


def publish(target: Path, schema: Schema, rows: list[Any]) -> Artifact:
    """Publish records directly, like a stage."""
    publication = Publication(target, schema, schema.name, target.name)
    publication.begin()
    ledger = Ledger("rows")
    ledger.keep(len(rows))
    publication.write_rows("shard-00000.jsonl", rows, ledger)
    return publication.publish(
        key_parts={}, inputs={}, input_paths={}, unit="rows", weights=None, versions={}, seconds={}, facts={}
    )


def make_pairs(count: int, *, seed: int = 0, longest: int = 12) -> list[Pair]:
    """Random pairs of varying length; truncated answers end without EOS."""
    rng = random.Random(seed)
    words = list(range(len(SPECIAL), len(IDS)))
    pairs = []
    for number in range(count):
        prompt = (IDS["<s>"], IDS["<|user|>"], *rng.choices(words, k=rng.randint(1, 6)), IDS["<|assistant|>"])
        answers = []
        for _ in range(2):
            finished = rng.random() < 0.7
            answers.append((*rng.choices(words, k=rng.randint(1, longest)), *((EOS,) if finished else ())))
        reasons = ["stop" if answer[-1] == EOS else "length" for answer in answers]
        pairs.append(
            Pair(
                pair_id=f"pair-{number:04d}",
                prompt_id=f"prompt-{number // 2:04d}",
                prompt="",
                prompt_ids=prompt,
                chosen_ids=answers[0],
                rejected_ids=answers[1],
                chosen="",
                rejected="",
                chosen_sample=2 * (number % 2),
                rejected_sample=2 * (number % 2) + 1,
                chosen_finish_reason=reasons[0],  # type: ignore[arg-type]
                rejected_finish_reason=reasons[1],  # type: ignore[arg-type]
                chosen_score=1.0,
                rejected_score=0.0,
                margin=1.0,
                strategy="max_min",
                iteration=0,
            )
        )
    return pairs


def make_reference(pairs: list[Pair], *, seed: int = 1) -> list[Score]:
    """Random reference log-probabilities of pairs."""
    rng = random.Random(seed)
    scores = []
    for pair in pairs:
        for sample, ids in ((pair.chosen_sample, pair.chosen_ids), (pair.rejected_sample, pair.rejected_ids)):
            values = tuple(-rng.uniform(2.0, 4.0) for _ in ids)
            scores.append(Score(pair.prompt_id, sample, sum(values), values))
    return scores


def make_model(target: Path, *, kind: str = "llama", tied: bool = True, seed: int = 0, **changes: Any) -> Path:
    """Save a random model with its tokenizer: two layers, hidden size 64; if not `tied`, with grouped-query
    attention."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(IDS),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2 if tied else 1,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "bos_token_id": IDS["<s>"],
        "eos_token_id": EOS,
        "pad_token_id": EOS,  # as in many models: padding must never hide an EOS
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "attention_dropout": 0.5,  # training must switch it off
    }
    config = AutoConfig.for_model(kind, **{**settings, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    backend = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="</s>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models `tied` and `gqa` (grouped-query attention, untied embeddings)."""
    folder = tmp_path_factory.mktemp("models")
    return {"tied": make_model(folder / "tied"), "gqa": make_model(folder / "gqa", tied=False, seed=1)}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """22 published `pairs` and their `reference`."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = make_pairs(22)
    publish(folder / "pairs", PAIRS, rows)
    publish(folder / "reference", SCORES, make_reference(rows))
    return {"pairs": folder / "pairs", "reference": folder / "reference"}


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 20 conversations."""
    rng = random.Random(3)
    path = tmp_path_factory.mktemp("demonstrations") / "train.jsonl"
    with path.open("w") as file:
        for _ in range(20):
            noun = rng.choice(["film", "book", "meal"])
            answer = f"the {noun} was {rng.choice(['great', 'good'])} ."
            messages = [{"role": "user", "content": f"review the {noun}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages, "source": "made up"}) + "\n")
    return path


def training_log(output: Path) -> list[dict[str, Any]]:
    """The lines of a checkpoint's training log."""
    return [json.loads(line) for line in (output / "training-log.jsonl").read_text().splitlines()]


def dpo_settings(models: dict[str, Path], pairs: dict[str, Path], output: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a short DPO training: 12 steps of 4 pairs."""
    return {
        "model": models["tied"],
        "pairs": [pairs["pairs"]],
        "reference": [pairs["reference"]],
        "output": output,
        "global_batch": 4,
        "epochs": 2,
        "learning_rate": 1e-3,
        **changes,
    }


def five_steps(stage: str, model: Path, pairs: dict[str, Path], demonstrations: Path) -> dict[str, Any]:
    """The settings of five SGD steps; an epoch's last batch is incomplete (22 = 3 x 6 + 4, 20 = 3 x 6 + 2)."""
    data = {
        "policy": {"pairs": [pairs["pairs"]], "reference": [pairs["reference"]], "nll_coefficient": 0.3},
        "reward": {"pairs": [pairs["pairs"]], "eval_fraction": 0.2},
        "sft": {"demonstrations": demonstrations},
    }[stage]
    return {
        "model": model,
        "global_batch": 6,
        "epochs": 2,
        "max_steps": 5,
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "schedule": "constant",
        **data,
    }


def assert_same_training(expected: Path, found: Path) -> None:
    """Assert that two trainings of five steps have changed the model and have the same losses, gradient norms and
    weights, up to rounding."""
    import torch
    from safetensors.torch import load_file

    lines, others = training_log(expected), training_log(found)
    assert [line.keys() for line in others] == [line.keys() for line in lines]
    assert len(lines) == 5
    for line, other in zip(lines, others, strict=True):
        assert other == pytest.approx(line, rel=1e-4, abs=1e-6)
    start = Artifact.open(expected).manifest.input_paths["model"]
    before = load_file(Path(start) / "model.safetensors")
    after, other = (load_file(path / "model.safetensors") for path in (expected, found))
    assert after.keys() == other.keys()
    moved = {name: float((after[name] - before[name]).abs().max()) for name in after.keys() & before.keys()}
    assert max(moved.values()) > 1e-3
    for name, value in after.items():
        torch.testing.assert_close(
            other[name], value, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
