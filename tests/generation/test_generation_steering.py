"""What steers sampling beside temperature, top-k and top-p: min-p, penalties, stop strings, forms, thoughts."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from generation_runs import generate, processes_with_argument, refuse, require_trace, rows
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from contracts.artifacts import Artifact
from contracts.config import Role
from contracts.engine_args import require_known
from contracts.errors import UserError
from contracts.records import Completion
from generation.config import GenerationConfig
from generation.engine_args import RESERVED
from generation.stop_strings import cut_at_stop, first_complete

EOS = 2
STOP = ["w7 w", " w12", "w30"]
STEERED: dict[str, Any] = {
    "shard_size": 13,
    "max_num_seqs": 16,
    "k": 3,
    "temperatures": [1.0, 0.7, 0.0],
    "top_k": 30,
    "top_p": 0.97,
    "min_p": 0.01,
    "min_new_tokens": 4,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": -0.2,
    "stop": STOP,
    "max_new_tokens": 24,
}


@pytest.fixture(scope="module")
def steered(engine: str, policy: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Everything at once that both engines can."""
    out = tmp_path_factory.mktemp("steered") / "out"
    return generate(out, engine=engine, policy=policy, prompts=prompts, **STEERED)


def test_log_probabilities_are_of_the_distribution_that_all_settings_leave(steered: Artifact, policy: Path) -> None:
    """Recomputed token by token from a forward pass of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    compared: Counter[float] = Counter()
    for row in rows(steered):
        for answer in row.completions:
            assert answer.sampling is not None
            with torch.no_grad():
                logits = model(torch.tensor([[*row.prompt_ids, *answer.response_ids]])).logits[0]
            expected = [
                _distribution(logits[len(row.prompt_ids) - 1 + place], row.prompt_ids, answer, place)[token]
                for place, token in enumerate(answer.response_ids)
            ]
            assert answer.logprobs == pytest.approx([float(value) for value in expected], abs=1e-4)
            compared[answer.sampling.temperature] += 1
    assert compared == {1.0: 26, 0.7: 26, 0.0: 26}


def _distribution(logits: Any, prompt_ids: tuple[int, ...], answer: Completion, place: int) -> Any:
    """Log-probabilities of the token at a place, by the records' parameters, one after the other."""
    import torch

    sampling, before, logits = answer.sampling, Counter(answer.response_ids[:place]), logits.clone()
    assert sampling is not None
    if place < 4:
        logits[EOS] = -torch.inf
    for token in {*prompt_ids, *before}:
        logits[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3
    for token, count in before.items():
        logits[token] -= 0.4 - 0.2 * count
    if sampling.temperature:
        logits /= sampling.temperature
        probabilities = logits.softmax(-1)
        logits[probabilities < 0.01 * probabilities.max()] = -torch.inf
        logits[logits < logits.topk(30).values[-1]] = -torch.inf
        values, order = logits.softmax(-1).sort(descending=True)
        logits[order[values.cumsum(-1) - values >= 0.97]] = -torch.inf
    return logits.log_softmax(-1)


def test_an_answer_ends_with_the_token_that_completes_a_stop_string(steered: Artifact) -> None:
    """Such an answer is whole, and holds neither EOS nor, in its text, the string."""
    seen = Counter(answer.finish_reason for row in rows(steered) for answer in row.completions)
    assert min(seen["stop"], seen["stop_string"]) > 3
    for row in rows(steered):
        for answer in row.completions:
            ids = answer.response_ids
            words = [[f"w{token - 6}" for token in ids[:end] if token >= 6] for end in range(len(ids) + 1)]
            ends = [_ends(words[end - 1], words[end]) for end in range(5, len(ids) + 1)]
            assert len(ids) > 4
            assert (EOS in ids) == (answer.finish_reason == "stop")
            assert not any(ends[:-1])
            assert bool(ends[-1]) == (answer.finish_reason == "stop_string")
            text = " ".join(["", *words[-1]])
            assert answer.text in [one[1:] for one in [text[: text.rindex(end)] for end in ends[-1]] or [text]]
    facts = steered.manifest.facts
    assert facts["stopped_by_string"] == seen["stop_string"]
    assert facts["stopped"] == seen["stop_string"] + seen["stop"]


def _ends(before: list[str], words: list[str]) -> list[str]:
    """The stop strings that the last of some words completes."""
    known, text = (" ".join(["", *some]) for some in (before, words))
    return [stop for stop in STOP if text.find(stop, max(0, len(known) - len(stop) + 1)) >= 0]


def test_records_say_what_was_sampled_with(steered: Artifact) -> None:
    sampled, _, greedy = (answer.sampling for answer in rows(steered)[0].completions)
    assert sampled is not None
    assert greedy is not None
    assert sampled.departures() == (
        "top_p=0.97, top_k=30, min_p=0.01, min_tokens=4, repetition_penalty=1.3, presence_penalty=0.4, "
        "frequency_penalty=-0.2"
    )
    assert sampled.stop == tuple(STOP)
    assert "min_p" not in greedy.departures()


@pytest.mark.slow
def test_answers_keep_to_a_form(policy: Path, prompts: Path, tmp_path: Path) -> None:
    """Log-probabilities are those among the tokens that the form allows: of the two choices, then of EOS alone."""
    pytest.importorskip("vllm", exc_type=ImportError)
    guided = {"choice": ["w5", "w7"]}
    made = generate(tmp_path / "out", policy=policy, prompts=prompts, count=8, guided=guided, max_new_tokens=9)
    for row in rows(made):
        likelihood = {}
        for answer in row.completions:
            assert answer.response_ids in ((11, EOS), (13, EOS))
            assert answer.sampling is not None
            assert answer.sampling.departures().startswith("guided=choice ")
            assert answer.logprobs[1] == 0
            likelihood[answer.text] = answer.logprobs[0]
        assert len(likelihood) == 1 or sum(map(math.exp, likelihood.values())) == pytest.approx(1)


@pytest.mark.slow
def test_a_form_that_vllm_cannot_keep_answers_to_is_the_users_mistake(
    policy: Path, prompts: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm", exc_type=ImportError)
    message = refuse(
        tmp_path / "out", policy=policy, prompts=prompts, count=1, max_new_tokens=9, guided={"grammar": "root ::= ("}
    )
    assert "guided: vLLM cannot constrain answers to this format" in message


@pytest.mark.slow
@pytest.mark.parametrize("servers", [0, 1])
def test_thoughts_end_after_so_many_tokens(policy: Path, prompts: Path, tmp_path: Path, servers: int) -> None:
    """The prompt's last token begins to think; the server is told the same, and of a stop string too.

    The server also traces a shard, and it ends with the stage.
    """
    pytest.importorskip("vllm", exc_type=ImportError)
    made = generate(
        tmp_path / "out",
        policy=policy,
        prompts=prompts,
        servers=servers,
        count=12,
        shard_size=4,
        profile_shards=[1] * servers,
        thinking={"tokens": 3, "start": "<assistant>", "end": "w11 w12"},
        stop=["w12 w"],
        engine_args={"enable_prefix_caching": False},
        max_new_tokens=12,
    )
    forced = 0
    for row in rows(made):
        for answer in row.completions:
            assert answer.sampling is not None
            assert answer.sampling.thinking_tokens == 3
            if len(answer.response_ids) >= 5:
                forced += 1
                assert answer.response_ids[3:5] == (17, 18)
                assert answer.logprobs[3:5] == (0, 0)
            if answer.finish_reason == "stop_string":
                assert answer.text.endswith("w11 ")
    assert forced > 40
    if servers:
        require_trace(tmp_path / "out.traces")
        assert processes_with_argument(policy) == []


@given(
    st.text("ab ", min_size=1, max_size=12), st.lists(st.text("ab ", min_size=1, max_size=3), min_size=1, max_size=3)
)
def test_the_stop_string_that_is_complete_first_ends_an_answer(text: str, stop: list[str]) -> None:
    """Character by character, every piece sees the same end as the whole text does."""
    complete = {end: [one for one in stop if text[:end].endswith(one)] for end in range(1, len(text) + 1)}
    expected = next((end for end, found in complete.items() if found), None)
    found = first_complete(text, stop, 0)
    assert (found is None) == (expected is None)
    if expected is not None and found is not None:
        assert found == complete[expected][0]
        assert first_complete(text[:expected], stop, expected - 1) == found
        assert cut_at_stop(text[:expected], text[: expected - 1], found, include=True) == text[:expected]
        assert cut_at_stop(text[:expected], text[: expected - 1], found, include=False) == text[: expected - len(found)]


@pytest.mark.parametrize(
    ("text", "before", "stop", "expected"),
    [
        ("a###b#", "a#", "##", "a"),  # the token wrote more than the string
        ("x", "", " x", ""),  # decoders of SentencePiece leave the first blank out
        ("caf\ufffd", "caf", "\u00e9", None),
        ("a stop, and stop", "a stop, and st", "stop", "a stop, and "),  # before min_new_tokens none counted
        ("\u00e9!", "\ufffd", "\u00e9", ""),
    ],
)
def test_the_text_ends_where_the_stop_string_begins(text: str, before: str, stop: str, expected: str | None) -> None:
    assert cut_at_stop(text, before, stop, include=False) == expected


def config(**values: Any) -> GenerationConfig:
    return GenerationConfig(**{"policy": "model", "prompts": "prompts", "output": "out", **values})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min_new_tokens": 20, "max_new_tokens": 10}, "min_new_tokens=20 is more than max_new_tokens=10"),
        ({"stop": [""]}, "at least 1 character"),
        ({"guided": {"regex": "a", "choice": ["b"]}}, "set exactly one of json_schema, regex, choice, grammar, not 2"),
        ({"guided": {}}, "not 0"),
        ({"guided": {"regex": "(a"}}, "is not a regular expression"),
        ({"guided": {"choice": ["a", "a"]}}, "contains a text twice"),
        ({"guided": {"regex": "a"}, "logprob_mode": "raw"}, "Set logprob_mode=processed"),
        ({"guided": {"regex": "a"}, "engine": "transformers"}, "guided is for engine=vllm"),
        ({"thinking": {"tokens": 5}, "engine": "transformers"}, "thinking is for engine=vllm"),
        ({"engine_args": {"enforce_eager": True}, "engine": "transformers"}, "engine_args is for engine=vllm"),
        ({"temperatures": [2.5]}, "vLLM accepts none above 2"),
        ({"engine_args": {"--block-size": 16}}, r"with underscores \(block_size\)"),
        ({"engine_args": {"max_model_len": 16}}, "max_model_len cannot be set here: it follows from the prompts"),
        ({"engine_args": {"logits_processors": ["a:B"]}}, "no record would show it"),
        ({"engine_args": {"trust_remote_code": True}}, "code of a model is never run"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**values)


def test_engine_arguments_are_those_of_the_installed_vllm() -> None:
    pytest.importorskip("vllm", exc_type=ImportError)
    require_known({"enforce_eager": True, "block_size": 16, "speculative_config": {}})
    with pytest.raises(
        UserError, match=r"engine_args\.enforce_eagr: .* no engine argument.*Did you mean 'enforce_eager'"
    ):
        require_known({"enforce_eagr": True})
    servers = {"host", "port", "api_key"}
    require_known(dict.fromkeys(RESERVED.keys() - servers))


def test_what_is_left_at_its_default_is_in_no_key() -> None:
    new = {"min_p", "min_new_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop"}
    new |= {"include_stop", "guided", "thinking", "engine_args"}
    assert not new & config().select(Role.IDENTITY).keys()
    given = config(stop=["x"], guided={"json_schema": {"type": "object"}}, engine_args={"block_size": 16})
    assert given.select(Role.IDENTITY)["guided"]["json_schema"] == {"type": "object"}
    assert given.select(Role.IDENTITY)["engine_args"] == {"block_size": 16}
