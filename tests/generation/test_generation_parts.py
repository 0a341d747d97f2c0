"""The pure parts: selection, shards, requests, and what is refused from an engine."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.artifacts import Artifact
from contracts.chat import ChatTokenizer
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.ledger import merge
from contracts.prompts import prompt_id
from contracts.publication import Publication
from contracts.records import ROLLOUTS, Message, Prompt, Rollout, Sampling
from contracts.stage import Context
from generation.config import GenerationConfig
from generation.engine import Answer, GenerationRequest
from generation.prompts import prompt_ids, select_prompts
from generation.rollouts import (
    answer_lengths,
    check_answer,
    default_shard_size,
    longest_first,
    make_shards,
    requests_of,
    sample_shard,
)
from generation.run import _settings


def config(**values: Any) -> GenerationConfig:
    return GenerationConfig(**{"policy": "model", "prompts": "prompts", "output": "out", **values})


def numbered(count: int) -> list[Prompt]:
    messages = [(Message("user", str(index)),) for index in range(count)]
    return [Prompt(prompt_id(one), one) for one in messages]


@given(
    lengths=st.lists(st.integers(1, 20), max_size=60),
    size=st.integers(1, 25),
    longest=st.one_of(st.none(), st.integers(1, 20)),
)
def test_cut_covers_the_input_exactly(lengths: list[int], size: int, longest: int | None) -> None:
    prompts = [(prompt, (0,) * length) for prompt, length in zip(numbered(len(lengths)), lengths, strict=True)]
    shards = make_shards(prompts, size, longest)
    kept = [item for item in prompts if longest is None or len(item[1]) <= longest]
    assert [item for shard in shards for item in shard.prompts] == kept
    assert len({shard.name for shard in shards}) == len(shards) == math.ceil(len(prompts) / size)
    assert sorted(shard.name for shard in shards) == [shard.name for shard in shards]
    assert all(shard.ledger.rows_in == size for shard in shards[:-1])
    total = merge((shard.ledger for shard in shards), "prompts")
    assert (total.rows_in, total.kept) == (len(prompts), len(kept))
    assert sum(total.dropped.values()) == len(prompts) - len(kept)


def test_prompts_that_the_template_refuses_are_dropped_and_counted_if_the_config_says_so(policy: Path) -> None:
    """The template knows no system turn."""
    tokenizer = ChatTokenizer(policy)
    plain, twice = Message("user", "w1"), (Message("system", "w2"), Message("user", "w3"))
    prompts = [Prompt("0" * 16, (plain,)), Prompt("1" * 16, twice), Prompt("2" * 16, (plain, plain))]
    with pytest.raises(
        UserError, match="refuses prompt 1111111111111111 of the turns system, user: no system messages"
    ):
        prompt_ids(tokenizer, prompts[1])
    rendered = [(prompt, prompt_ids(tokenizer, prompt, drop=True)) for prompt in prompts]
    (shard,) = make_shards(rendered, 5, 4)
    assert [prompt.prompt_id for prompt, _ in shard.prompts] == ["0" * 16]
    assert str(shard.ledger) == "3 prompts in = 1 kept + 1 refused + 1 too_long"


def test_an_answer_whose_beginning_is_given_goes_on_from_it(policy: Path) -> None:
    """The beginning is part of the prompt's ids, and not of the answer's."""
    prompt = Prompt("0" * 16, (Message("user", "w1"), Message("assistant", "w2 w3")))
    ids = prompt_ids(ChatTokenizer(policy), prompt)
    assert ids == (1, 4, 7, 5, 8, 9)
    (shard,) = make_shards([(prompt, ids)], 1, None)
    (row,), _, _ = sample_shard(shard, Recorder(), ChatTokenizer(policy), config(k=1), "weights")
    assert row.prompt_ids == ids
    assert row.completions[0].response_ids == (16, 2)
    assert row.completions[0].text == " w10"
    assert row.messages == prompt.messages


def test_shards_with_the_longest_answers_come_first(raw: Artifact, tmp_path: Path) -> None:
    prompts = [(prompt, (0,)) for prompt in numbered(7)]
    shards = make_shards(prompts, 2, None)
    assert longest_first(shards, {}) == [shard.name for shard in shards]  # the last one has a prompt less
    lengths = {prompts[0][0].prompt_id: 1.0, prompts[4][0].prompt_id: 9.0, prompts[6][0].prompt_id: 20.0}
    # 1 + the mean of 10, 10 + 10, 9 + 10, 20
    assert longest_first(shards, lengths) == [shards[index].name for index in (1, 3, 2, 0)]
    known = answer_lengths([tmp_path / "not there", raw.path])
    row = next(raw.rows(Rollout))
    assert known[row.prompt_id] == sum(len(one.response_ids) for one in row.completions) / len(row.completions)
    assert answer_lengths([tmp_path / "not there"]) == {}


@given(start=st.integers(0, 200), count=st.integers(1, 26))
def test_selection_goes_round_and_uses_no_prompt_twice(prompts: Path, start: int, count: int) -> None:
    everything = select_prompts(config(prompts=prompts))
    chosen = select_prompts(config(prompts=prompts, start=start, count=count))
    assert [prompt.prompt_id for prompt in chosen] == [
        everything[(start + offset) % 26].prompt_id for offset in range(count)
    ]
    assert len({prompt.prompt_id for prompt in chosen}) == count


def test_shard_size_depends_on_the_samples_in_flight_alone() -> None:
    assert default_shard_size(config(k=4, max_num_seqs=256)) == 512
    assert default_shard_size(config(k=4, max_num_seqs=256, replicas=8)) == 512
    assert default_shard_size(config(k=64, temperatures=[1.0], max_num_seqs=4)) == 1


def test_a_process_with_a_role_counts_the_devices_of_its_own_engine(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One GPU each is what two replicas are given, and what each of them sees; a publisher needs none."""
    torch = pytest.importorskip("torch")
    tokenizer = ChatTokenizer(policy)
    one = Prompt("0" * 16, (Message("user", "w1"),))
    shards = list(make_shards([(one, (1, 2))], 1, None))

    def on_gpu(visible: int, role: Any, **values: int) -> bool:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        context = Context(Publication(tmp_path / "out", ROLLOUTS, "generation", "k" * 64), 1, 3, role)
        return _settings(config(policy=policy, **values), context, tokenizer, shards, None).on_gpu

    assert on_gpu(1, "replica", replicas=2)
    assert on_gpu(1, "task", replicas=2)
    assert on_gpu(2, None, replicas=2)
    assert not on_gpu(0, "publisher", tensor_parallel=4)
    with pytest.raises(UserError, match="this machine shows 1 GPUs"):
        on_gpu(1, None, replicas=2)
    with pytest.raises(UserError, match="this machine shows 1 GPUs"):
        on_gpu(1, "task", tensor_parallel=2)


def test_every_sample_has_a_seed_of_its_own() -> None:
    seeds: Counter[int] = Counter()
    for iteration in range(3):
        stage = config(k=8, temperatures=[1.0, 0.7], iteration=iteration)
        for prompt in numbered(50):
            for request in requests_of(prompt, (1, 2), stage):
                seeds.update(request.seed + sample for sample in range(request.n))
    assert len(seeds) == 3 * 50 * 8


def test_greedy_requests_record_no_filter() -> None:
    stage = config(k=2, temperatures=[0.0, 1.0], top_p=0.9, top_k=5, max_new_tokens=3)
    greedy, sampled = requests_of(numbered(1)[0], (1,), stage)
    assert greedy.sampling == Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=3)
    assert sampled.sampling == Sampling(temperature=1.0, top_p=0.9, top_k=5, max_tokens=3)


class Recorder:
    """An engine that echoes the length of the prompt and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[GenerationRequest] = []

    def generate(self, requests: Any, batch: str) -> list[list[Answer]]:
        self.asked = list(requests)
        return [
            [
                Answer((10 + len(request.prompt_ids), 2), (-1.0, -0.5), "stop", request.seed + j)
                for j in range(request.n)
            ]
            for request in requests
        ]

    def close(self) -> None: ...


def test_the_longest_prompts_are_submitted_first_and_rows_keep_their_order(policy: Path) -> None:
    prompts = [(prompt, (1,) * length) for prompt, length in zip(numbered(5), (3, 9, 4, 9, 1), strict=True)]
    (shard,) = make_shards(prompts, 5, None)
    engine = Recorder()
    rollouts, _, _ = sample_shard(shard, engine, ChatTokenizer(policy), config(k=4, temperatures=[1.0, 0.5]), "weights")
    assert [len(request.prompt_ids) for request in engine.asked] == [9, 9, 9, 9, 4, 4, 3, 3, 1, 1]
    assert [request.sampling.temperature for request in engine.asked] == [1.0, 0.5] * 5
    assert [row.prompt_id for row in rollouts] == [prompt.prompt_id for prompt, _ in prompts]
    for row in rollouts:
        assert {answer.response_ids[0] for answer in row.completions} == {10 + len(row.prompt_ids)}


GOOD = Answer((7, 8, 2), (-0.1, -0.2, -0.3), "stop", 5)


def test_consistent_answers_pass() -> None:
    check_answer(GOOD, 3, [2])
    check_answer(Answer((7, 8, 9), (0.0, -0.2, -0.3), "length", 5), 3, [2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"response_ids": (), "logprobs": ()}, "0 tokens instead of 1 to 3"),
        ({"response_ids": (7, 8, 9, 2), "logprobs": (-1.0,) * 4}, "4 tokens instead of 1 to 3"),
        ({"response_ids": (7, 8, 9)}, "stop tokens are at \\[\\] of 3"),
        ({"response_ids": (7, 2, 2)}, "stop tokens are at \\[1, 2\\] of 3"),
        ({"finish_reason": "length"}, "stop tokens are at \\[2\\] of 3"),
        ({"response_ids": (7, 8), "logprobs": (-1.0, -1.0), "finish_reason": "length"}, "truncated after 2 of 3"),
        ({"finish_reason": "abort"}, "is none of stop, stop_string, length"),
        ({"logprobs": (-0.1, -0.2)}, "3 tokens, but 2 log-probabilities"),
        ({"logprobs": (-0.1, float("nan"), -0.3)}, "not a number"),
        ({"logprobs": (-0.1, float("-inf"), -0.3)}, "not a number"),
        ({"logprobs": (-0.1, 0.2, -0.3)}, "not a number"),
    ],
)
def test_inconsistent_answers_are_an_error(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        check_answer(msgspec.structs.replace(GOOD, **changes), 3, [2])


class Unreliable(Recorder):
    """An engine that fails for the prompts of one length."""

    def generate(self, requests: Sequence[GenerationRequest], batch: str) -> Sequence[list[Answer] | Fault]:
        answers = super().generate(requests, batch)
        return [
            Fault(RuntimeError(f"no answer for {len(request.prompt_ids)} tokens"))
            if len(request.prompt_ids) == 9
            else answer
            for request, answer in zip(requests, answers, strict=True)
        ]


def test_prompts_that_the_engine_fails_on_are_dropped_and_counted_up_to_a_share(policy: Path) -> None:
    prompts = [(prompt, (1,) * length) for prompt, length in zip(numbered(5), (3, 9, 4, 20, 1), strict=True)]
    (shard,) = make_shards(prompts, 5, 10)
    tolerant = config(k=2, fail_on_error=0.2)
    rollouts, ledger, faults = sample_shard(shard, Unreliable(), ChatTokenizer(policy), tolerant, "weights")
    assert [row.prompt_id for row in rollouts] == [prompts[index][0].prompt_id for index in (0, 2, 4)]
    assert str(ledger) == "5 prompts in = 3 kept + 1 failed + 1 too_long"
    assert faults.messages == ["RuntimeError: no answer for 9 tokens"]
    faults.require_few(ledger)
    faults.limit = 0.1
    with pytest.raises(UserError, match=r"1 of 5 prompts failed.*no answer for 9 tokens"):
        faults.require_few(ledger)
    with pytest.raises(RuntimeError, match="no answer for 9 tokens"):
        sample_shard(shard, Unreliable(), ChatTokenizer(policy), config(k=2), "weights")
