"""SFT's tokens, the reward model, and the mistakes that users make."""

import json
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from conftest import EOS, IDS, ROOT, TEMPLATE, make_pairs, make_reference, publish, run_cli, run_here, training_log
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from contracts.chat import ChatTokenizer
from contracts.config import apply_overrides
from contracts.demonstrations import DemonstrationRow
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.records import PAIRS, SCORES, Message, Pair
from contracts.template import ChatTemplate
from training.reward import held_out_prompts
from training.sft import tokenized

QUESTION = Message("user", "review the film")


def rows_of(models: dict[str, Path], conversation: list[Message], template: str = TEMPLATE) -> tuple[Any, Ledger]:
    chat = ChatTokenizer(models["tied"])
    chat.template = ChatTemplate(models["tied"], text=template)
    ledger = Ledger("demonstrations")
    conversations = iter([DemonstrationRow(tuple(conversation))])
    return list(tokenized(conversations, chat, ledger)), ledger


def words(text: str) -> tuple[int, ...]:
    return tuple(IDS[word] for word in text.split())


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        TEMPLATE.replace("{{ eos_token }}", "{{ eos_token }} ."),  # something after the end of the turn
        TEMPLATE.replace("{{ message.content }} {{ eos_token }}", "{{ message.content }}"),  # no end of turn at all
    ],
    ids=["plain", "tail", "no-eos"],
)
def test_sft_learns_to_stop_where_the_engine_stops(template: str, models: dict[str, Path]) -> None:
    (row,), _ = rows_of(models, [QUESTION, Message("assistant", "the film was great")], template)
    (response,) = row.responses
    assert tuple(row.prompt) == words("<s> <|user|> review the film <|assistant|>")
    assert tuple(response.ids) == (*words("the film was great"), EOS)


def test_sft_trains_the_last_answer_only(models: dict[str, Path]) -> None:
    turns = [QUESTION, Message("assistant", "bad ."), QUESTION, Message("assistant", "good .")]
    (row,), _ = rows_of(models, turns)
    (response,) = row.responses
    assert tuple(response.ids) == (*words("good ."), EOS)
    assert EOS in row.prompt


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([QUESTION], "no_answer"),
        ([QUESTION, QUESTION], "no_answer"),
        ([QUESTION, Message("assistant", "")], "empty_answer"),
        ([QUESTION, Message("assistant", " \n")], "empty_answer"),
        ([QUESTION, Message("assistant", "great </s> bad")], "stop_inside"),
    ],
)
def test_sft_counts_what_it_drops(conversation: list[Message], reason: str, models: dict[str, Path]) -> None:
    rows, ledger = rows_of(models, conversation)
    assert (rows, ledger.dropped) == ([], {reason: 1})


def test_sft_puts_answers_behind_the_prompts_that_generation_makes(models: dict[str, Path]) -> None:
    template = TEMPLATE.replace("%} <|assistant|>{% endif %}", "%} <|user|> <|assistant|>{% endif %}")
    (row,), _ = rows_of(models, [QUESTION, Message("assistant", "great")], template)
    assert tuple(row.prompt) == words("<s> <|user|> review the film <|user|> <|assistant|>")
    assert tuple(row.responses[0].ids) == (IDS["great"], EOS)


def test_sft_learns(models: dict[str, Path], demonstrations: Path, tmp_path: Path) -> None:
    artifact = run_here(
        "sft", model=models["tied"], demonstrations=demonstrations, output=tmp_path / "out",
        global_batch=20, epochs=40, learning_rate=1e-2, schedule="linear",
    )  # fmt: skip
    losses = [line["loss"] for line in training_log(artifact.path)]
    assert losses[-1] < 0.5 < losses[0]
    model = AutoModelForCausalLM.from_pretrained(artifact.path)
    prompt = torch.tensor([words("<s> <|user|> review the film <|assistant|>")])
    answer = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert tuple(answer) in {(*words(f"the film was {word} ."), EOS) for word in ("great", "good")}


def graded_pairs(count: int) -> list[Pair]:
    """Pairs that can be learnt: the chosen answer says great, the rejected one awful."""
    return [
        msgspec.structs.replace(
            pair,
            chosen_ids=(*pair.chosen_ids[:3], IDS["great"], EOS),
            rejected_ids=(*pair.rejected_ids[:3], IDS["awful"], EOS),
        )
        for pair in make_pairs(count, seed=5)
    ]


def test_reward_model_learns_and_reads_the_last_token(models: dict[str, Path], tmp_path: Path) -> None:
    rows = graded_pairs(60)
    publish(tmp_path / "pairs", PAIRS, rows)
    settings = {"model": models["tied"], "pairs": [tmp_path / "pairs"], "eval_fraction": 0.2, "global_batch": 24}
    artifact = run_here("reward", **settings, epochs=8, learning_rate=3e-3, output=tmp_path / "out")
    facts = artifact.manifest.facts
    assert (facts["training_pairs"], facts["held_out_pairs"]) == (48, 12)
    assert str(artifact.manifest.ledger) == "60 pairs in = 60 kept"
    assert facts["final"]["held_out_accuracy"] >= 0.9
    assert training_log(artifact.path)[-1]["held_out_accuracy"] == facts["final"]["held_out_accuracy"]
    model = AutoModelForSequenceClassification.from_pretrained(artifact.path)
    assert (model.config.num_labels, model.config.pad_token_id, type(model).__name__) == (
        1, EOS, "LlamaForSequenceClassification",
    )  # fmt: skip
    # pad == EOS here: the score must be the one at the EOS itself.
    held_out = held_out_prompts({pair.prompt_id for pair in rows}, 0.2, 0)
    right = 0
    for pair in (pair for pair in rows if pair.prompt_id in held_out):
        scores = []
        for ids in (pair.chosen_ids, pair.rejected_ids):
            hidden = model.model(torch.tensor([pair.prompt_ids + ids])).last_hidden_state
            scores.append(float(model.score(hidden[0, -1])))
        right += scores[0] > scores[1]
    assert right / 12 == pytest.approx(facts["final"]["held_out_accuracy"])
    again = run_here("reward", **settings, epochs=8, learning_rate=3e-3, output=tmp_path / "again")
    assert again.manifest.files == artifact.manifest.files
    other = run_here("reward", **settings, seed=1, max_steps=1, output=tmp_path / "other")
    assert other.manifest.digest != artifact.manifest.digest


def test_held_out_prompts_are_never_trained_on() -> None:
    prompts = {f"prompt-{number}" for number in range(50)}
    chosen = held_out_prompts(prompts, 0.3, 1)
    assert len(chosen) == 15
    assert chosen <= prompts
    assert chosen == held_out_prompts(prompts | {"prompt-1"}, 0.3, 1)
    assert chosen != held_out_prompts(prompts, 0.3, 2)


def test_a_non_finite_loss_stops_before_the_step(models: dict[str, Path], tmp_path: Path) -> None:
    pairs = make_pairs(4)
    publish(tmp_path / "pairs", PAIRS, pairs)
    publish(tmp_path / "reference", SCORES, make_reference(pairs))
    settings = {"pairs": [tmp_path / "pairs"], "reference": [tmp_path / "reference"], "output": tmp_path / "out"}
    with pytest.raises(UserError, match=r"step 2: .* nan for the rows pair-000\d, pair-000\d"):
        run_here("policy", model=models["tied"], **settings, epochs=3, optimizer="sgd", learning_rate=1e30)
    assert not (tmp_path / "out").exists()


def test_long_rows_are_dropped_and_counted(models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in make_pairs(22)]
    limit = sorted(lengths)[-3] - 1
    settings = {"model": models["tied"], "pairs": [pairs["pairs"]], "reference": [pairs["reference"]]}
    long = sum(length > limit for length in lengths)
    artifact = run_here("policy", **settings, output=tmp_path / "out", max_length=limit, max_dropped=0.5)
    assert artifact.manifest.ledger.dropped == {"too_long": long}
    assert artifact.manifest.ledger.kept == 22 - long
    with pytest.raises(UserError, match="max_dropped"):
        run_here("policy", **settings, output=tmp_path / "none", max_length=limit, max_dropped=0.01)


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """References that do not fit the pairs, and pairs of another tokenizer."""
    folder = tmp_path_factory.mktemp("foreign")
    rows = make_pairs(22)
    reference = make_reference(rows)
    publish(folder / "missing", SCORES, reference[:-1])
    publish(folder / "twice", SCORES, [*reference, reference[0]])
    shorter = msgspec.structs.replace(
        reference[0], token_logprobs=(reference[0].token_logprobs or ())[1:] or (0.0, 0.0)
    )
    publish(folder / "length", SCORES, [shorter, *reference[1:]])
    publish(folder / "rewards", SCORES, [msgspec.structs.replace(score, token_logprobs=None) for score in reference])
    other = msgspec.structs.replace(rows[0], chosen_ids=(len(IDS),) * len(rows[0].chosen_ids))
    publish(folder / "tokens", PAIRS, [other, *rows[1:]])
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "missing"}, "has no log-probabilities of prompt"),
        ({"reference": "twice"}, "twice"),
        ({"reference": "length"}, "it is of other rollouts"),
        ({"reference": "rewards"}, "another kind of scorer"),
        ({"pairs": "tokens"}, "the model's vocabulary has"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_references_that_do_not_fit(
    change: dict[str, str],
    message: str,
    foreign: dict[str, Path],
    models: dict[str, Path],
    pairs: dict[str, Path],
    tmp_path: Path,
) -> None:
    settings = {name: [foreign[change[name]]] if name in change else [pairs[name]] for name in ("pairs", "reference")}
    with pytest.raises(UserError, match=message):
        run_here("policy", model=models["tied"], **settings, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model=nowhere", "does not exist"),
        ("model=.", "is not a model"),
        ("max_length=65", "context of"),
        ("max_length=2", "no usable row"),
        ("frozen=[nothing]", "no parameter's name contains 'nothing'"),
        ("reference=[]", "reference"),
        ("settings.bta=0.2", "Did you mean 'beta'"),
    ],
)  # fmt: skip
def test_mistakes_are_told(
    change: str, message: str, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"model": models["tied"], "pairs": [pairs["pairs"]], "reference": [pairs["reference"]]}
    with pytest.raises(UserError, match=re.escape(message)):
        run_here("policy", **apply_overrides({**settings, "output": tmp_path / "out"}, [change]))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("frozen=[nothing]", "no parameter's name contains 'nothing'"),
        ("parallel.dp=2 max_length=2", "no usable row"),
        ("parallel.tp=4", "does not divide num_attention_heads (2)"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_message_and_exit_code_2(
    change: str, message: str, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ["policy", f"model={models['tied']}", f"pairs=[{pairs['pairs']}]", f"reference=[{pairs['reference']}]"]
    result = run_cli(*arguments, f"output={tmp_path / 'out'}", *change.split(), check=False)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_failing_rank_leaves_its_failure_for_the_supervisor(
    models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ["policy", f"model={models['tied']}", f"pairs=[{pairs['pairs']}]", f"reference=[{pairs['reference']}]"]
    result = run_cli(
        *arguments, f"output={tmp_path / 'out'}", "parallel.dp=2", "frozen=[nothing]",
        check=False, RATCHET_ATTEMPT=str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 2
    failures = [json.loads(path.read_text()) for path in tmp_path.glob("failure-*.json")]
    first, *others = sorted(failures, key=lambda failure: float(failure["time"]))
    assert first["kind"] == "user"
    assert "contains 'nothing'" in first["text"]
    assert {failure["kind"] for failure in others} <= {"user", "stopped"}  # the launcher may be faster than the rank


LEAVES = """
import os
import sys

from training.algorithm import Metrics, Pairs
from training.algorithms import dpo

READS = "pairs"
NEEDS = ("reference",)


def loss(batch: Pairs, *, beta: float = 0.1) -> Metrics:
    return sys.exit(3) if os.environ["RANK"] == "1" else dpo.loss(batch, beta=beta)
"""


def test_a_rank_that_leaves_is_named(models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text(LEAVES)
    arguments = ["policy", f"model={models['tied']}", f"pairs=[{pairs['pairs']}]", f"reference=[{pairs['reference']}]"]
    result = run_cli(
        *arguments, f"output={tmp_path / 'out'}", "parallel.dp=2", f"algorithm={tmp_path / 'leaves.py'}", check=False
    )
    assert result.returncode == 1
    assert "process 1 of the training ended with exit code 3" in result.stderr


def test_the_script_runs_the_stage(models: dict[str, Path], tmp_path: Path) -> None:
    import subprocess
    import sys

    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / "train.sh"), "policy", "output=x"],
        env={**os.environ, "PYTHON": sys.executable}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "'model' is required" in result.stderr
