"""What is published: the records of both engines, checked against the model itself."""

import os
from collections import Counter
from pathlib import Path

import pytest
from generation_runs import rows

from contracts.artifacts import Artifact
from contracts.fingerprint import weights_fingerprint
from contracts.records import PROMPTS, Completion, Prompt
from contracts.seeds import derive_seed

BOS, EOS, USER, ASSISTANT = 1, 2, 4, 5


def test_rows_are_the_prompts_in_order_with_their_tokens(processed: Artifact, prompts: Path) -> None:
    given = list(Artifact.open(prompts, PROMPTS).rows(Prompt))
    found = rows(processed)
    assert [row.prompt_id for row in found] == [prompt.prompt_id for prompt in given]
    for row, prompt in zip(found, given, strict=True):
        words = [int(word.removeprefix("w")) + 6 for word in prompt.messages[0].content.split()]
        assert list(row.prompt_ids) == [BOS, USER, *words, ASSISTANT]
        assert (row.messages, row.answer, row.tags) == (prompt.messages, prompt.answer, prompt.tags)


def test_shards_cover_the_prompts_exactly(processed: Artifact) -> None:
    assert [file.rows for file in processed.manifest.files] == [8, 8, 8, 2]
    assert str(processed.manifest.ledger) == "26 prompts in = 26 kept"
    assert processed.damage() == []


def test_answers_end_with_eos_exactly_when_they_stopped(processed: Artifact, raw: Artifact) -> None:
    seen: Counter[str] = Counter()
    for limit, artifact in ((24, processed), (48, raw)):
        for row in rows(artifact):
            for answer in row.completions:
                seen[answer.finish_reason] += 1
                assert (answer.response_ids[-1] == EOS) == (answer.finish_reason == "stop")
                assert EOS not in answer.response_ids[:-1]
                assert len(answer.response_ids) == limit or answer.finish_reason == "stop"
                assert len(answer.logprobs) == len(answer.response_ids)
                assert "<eos>" not in answer.text
                body = answer.response_ids[:-1] if answer.finish_reason == "stop" else answer.response_ids
                assert answer.text.split() == [f"w{token - 6}" for token in body if token >= 6]
    assert seen["stop"] > 10
    assert seen["length"] > 10


def test_samples_are_numbered_and_carry_seed_and_temperature(processed: Artifact) -> None:
    for row in rows(processed):
        assert [answer.sample for answer in row.completions] == [0, 1, 2, 3]
        assert [answer.sampling.temperature for answer in row.completions if answer.sampling] == [1.0, 1.0, 0.7, 0.7]
        bases = [derive_seed(0, 2, row.prompt_id, group) for group in (0, 1)]
        assert [answer.seed for answer in row.completions] == [bases[0], bases[0] + 1, bases[1], bases[1] + 1]
        assert row.iteration == 2
    answers = {answer.response_ids for row in rows(processed) for answer in row.completions}
    assert len(answers) > 0.9 * 4 * 26


def test_manifest_tells_the_weights_and_the_facts(processed: Artifact, policy: Path, engine: str) -> None:
    fingerprint = weights_fingerprint(policy)
    manifest = processed.manifest
    assert manifest.weights == fingerprint
    assert {row.policy for row in rows(processed)} == {fingerprint}
    answers = [answer for row in rows(processed) for answer in row.completions]
    lengths = [len(answer.response_ids) for answer in answers]
    stopped = sum(answer.finish_reason == "stop" for answer in answers)
    assert manifest.facts["completions"] == len(answers) == 104
    assert manifest.facts["response_tokens"] == sum(lengths)
    assert manifest.facts["response_length"] == pytest.approx(sum(lengths) / 104)
    assert manifest.facts["stop_rate"] == pytest.approx(stopped / 104)
    assert (manifest.facts["engine"], manifest.facts["dtype"]) == (engine, "float32")
    assert manifest.facts["threads"] == os.environ["OMP_NUM_THREADS"]
    assert {"load", "compute", "save", "total"} <= set(manifest.seconds)


def test_processed_logprobs_are_of_the_distribution_sampled_from(processed: Artifact, policy: Path) -> None:
    """After temperature, top-k 40 and top-p 0.95, recomputed from a forward pass of transformers."""
    compared = _compare(processed, policy, processed_mode=True)
    assert compared == {1.0: 52, 0.7: 52}


def test_raw_logprobs_are_the_models_own(raw: Artifact, policy: Path) -> None:
    assert _compare(raw, policy, processed_mode=False) == {0.7: 26, 0.0: 26}


def test_greedy_takes_the_likeliest_token(raw: Artifact, policy: Path) -> None:
    for row in rows(raw):
        greedy = row.completions[1]
        assert greedy.sampling is not None
        assert greedy.sampling.temperature == 0
        likeliest = _logits(policy, row.prompt_ids, greedy).argmax(-1)
        assert likeliest.tolist() == list(greedy.response_ids)


def _logits(policy: Path, prompt_ids: tuple[int, ...], answer: Completion):  # type: ignore[no-untyped-def]
    """Logits of every response token, of shape [response, vocabulary]."""
    import torch
    from transformers import AutoModelForCausalLM

    if policy not in _models:
        _models[policy] = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    ids = torch.tensor([[*prompt_ids, *answer.response_ids]])
    with torch.inference_mode():
        return _models[policy](ids).logits[0, len(prompt_ids) - 1 : -1]


_models: dict[Path, object] = {}


def _compare(artifact: Artifact, policy: Path, *, processed_mode: bool) -> dict[float, int]:
    """Check every log-probability to 1e-4; return how many answers were checked, by temperature."""
    import torch

    compared: Counter[float] = Counter()
    for row in rows(artifact):
        for answer in row.completions:
            assert answer.sampling is not None
            logits = _logits(policy, row.prompt_ids, answer)
            if processed_mode:
                logits = logits / answer.sampling.temperature
                logits[logits < logits.topk(answer.sampling.top_k).values[:, -1:]] = -torch.inf
                values, order = logits.softmax(-1).sort(descending=True)
                beyond = values.cumsum(-1) - values >= answer.sampling.top_p
                logits[torch.zeros_like(beyond).scatter(1, order, beyond)] = -torch.inf
            expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.response_ids)[:, None]).squeeze(1)
            assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
            compared[answer.sampling.temperature] += 1
    return dict(compared)
