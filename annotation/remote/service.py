"""The scorer kind `http`: sends batches of answers to a service that returns rewards.

Ratchet's own protocol is documented in docs/scorers.md. OpenRLHF's is that of its `reward.remote_url`: the request has
`{"query", "prompts", "labels"}`, lists of texts, and the reply of `serve_rm` has `{"rewards"}`, a list of numbers, plus
`scores` and `extra_logs`.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from annotation.remote.client import BadReplyError, Client, ServerError, WrongEndpointError, run_concurrently
from annotation.samples import Sample
from annotation.scorers.base import Opening
from annotation.scorers.http import HttpSettings
from annotation.workers.journal import ShardJournals
from annotation.workers.pool import FunctionResult
from annotation.workers.rule import describe, score_record
from annotation.workers.worker import AnswerInput, Failed, convert_result
from contracts.errors import TransientError, UserError
from contracts.faults import Fault, Tolerance
from contracts.records import Score

Body = Callable[[Sequence[Sample]], dict[str, Any]]
Read = Callable[[Any, int], list[Any]]
"""Reads a reply for the given number of samples: one value for each."""


class RewardService:
    """Sends answers in fixed batches, so that a kill does not change them."""

    def __init__(self, config: HttpSettings, opening: Opening) -> None:
        self.config = config
        self.journals = ShardJournals(opening.state, Tolerance(config.fail_on_error, opening.samples))
        self.body: Body = _samples if config.protocol == "ratchet" else OpenRlhfTexts(config)
        self.read: Read = _scores if config.protocol == "ratchet" else _rewards
        self.client = Client(
            config.url, key_variable=config.key_variable, timeout=config.timeout, retries=config.retries
        )
        self.facts: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample; "unscored" if the service returns null."""
        size = self.config.batch_size
        batches = [range(start, min(start + size, len(samples))) for start in range(0, len(samples), size)]
        with self.journals.of(samples) as (results, note):
            self._ask(samples, [batch for batch in batches if not results.keys() >= set(batch)], note)
            self._require_same(samples, [batch for batch in batches if batch.start < self.config.judge_twice], results)
        self.counts = {"requests_repeated": self.client.retried}
        self.client.retried = 0
        return [score_record(sample, results[index]) for index, sample in enumerate(samples)]

    def _ask(
        self, samples: Sequence[Sample], batches: Sequence[range], note: Callable[[dict[int, FunctionResult]], None]
    ) -> None:
        async def send(number: int) -> None:
            await self._send(samples, batches[number], note)

        run_concurrently(self.client, len(batches), send, self.config.concurrency)

    async def _send(
        self, samples: Sequence[Sample], batch: range, note: Callable[[dict[int, FunctionResult]], None]
    ) -> None:
        """Score a batch. If the service fails on it, send its halves, so that only the samples that cause it fail."""
        asked = [samples[index] for index in batch]
        try:
            results = await self.client.ask("POST", "", self.body(asked), lambda reply: self.read(reply, len(asked)))
        except WrongEndpointError:
            raise
        except (UserError, TransientError) as error:
            if len(batch) > 1 and isinstance(error, UserError | ServerError):
                half = len(batch) // 2
                for part in (batch[:half], batch[half:]):
                    await self._send(samples, part, note)
                return
            note({index: Fault(type(error)(f"{self._named(samples[index])}: {error}")) for index in batch})
            return
        note({index: self._result(samples[index], value) for index, value in zip(batch, results, strict=True)})

    def _result(self, sample: Sample, value: Any) -> FunctionResult:
        found = convert_result(value, _answer_input(sample), tokens=True)
        if isinstance(found, Failed):
            return Fault(UserError(f"service {self.config.service!r} {found.before} {sample}{found.after}"))
        assert found is not True
        return found

    def _named(self, sample: Sample) -> str:
        return f"service {self.config.service!r} at {sample}"

    def _require_same(
        self, samples: Sequence[Sample], batches: Sequence[range], results: dict[int, FunctionResult]
    ) -> None:
        """Send the first answers again.

        Raises:
            UserError: a score differs.
        """
        again: dict[int, FunctionResult] = {}
        self._ask(samples, batches, again.update)
        for index, now in sorted(again.items()):
            before = results[index]
            if not isinstance(before, Fault) and not isinstance(now, Fault) and before != now:
                raise UserError(
                    f"service {self.config.service!r} scored {samples[index]} twice with different results: "
                    f"{describe(before)}, then {describe(now)}. Remove what is random, or set judge_twice=0 if results "
                    "may differ."
                )


def _answer_input(sample: Sample) -> AnswerInput:
    rollout, completion = sample
    return AnswerInput(
        messages=[msgspec.to_builtins(message) for message in rollout.messages],
        response=completion.text,
        finish_reason=completion.finish_reason,
        answer=rollout.answer,
        tags=list(rollout.tags),
        tools=None if rollout.tools is msgspec.UNSET else list(rollout.tools),
        response_ids=list(completion.response_ids),
        prompt_id=rollout.prompt_id,
        sample=completion.sample,
    )


def _samples(samples: Sequence[Sample]) -> dict[str, Any]:
    return {"samples": [msgspec.structs.asdict(_answer_input(sample)) for sample in samples]}


def _scores(reply: Any, count: int) -> list[Any]:
    if not isinstance(reply, dict) or "scores" not in reply:
        raise BadReplyError(f"the service replied {_shown(reply)}, and not an object with the list `scores`.")
    return _require_count(reply["scores"], "scores", count)


class OpenRlhfTexts:
    """Decodes the policy's tokens to texts with special tokens, as OpenRLHF's trainer sends them."""

    def __init__(self, config: HttpSettings) -> None:
        from contracts.tokenizer import load_tokenizer

        assert config.tokenizer is not None
        self._tokenizer = load_tokenizer(config.tokenizer)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The request body for a batch."""
        prompts = [list(sample.rollout.prompt_ids) for sample in samples]
        queries = [[*ids, *sample.completion.response_ids] for ids, sample in zip(prompts, samples, strict=True)]
        labels = ["" if sample.rollout.answer is None else sample.rollout.answer for sample in samples]
        return {
            "query": [self._tokenizer.decode(ids, skip_special_tokens=False) for ids in queries],
            "prompts": [self._tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts],
            "labels": labels,
        }


def _rewards(reply: Any, count: int) -> list[Any]:
    """The rewards; entries of `extra_logs` with one number per reward become parts."""
    rewards = reply.get("rewards", reply.get("scores")) if isinstance(reply, dict) else None
    if rewards is None:
        raise BadReplyError(f"the service replied {_shown(reply)}, and not an object with the list `rewards`.")
    values = [_unwrap(value) for value in _require_count(rewards, "rewards", count)]
    logs = reply.get("extra_logs")
    parts = {
        name: [_unwrap(value) for value in listed]
        for name, listed in (logs.items() if isinstance(logs, dict) else ())
        if isinstance(listed, list) and len(listed) == count and name != "score"
    }
    if not parts:
        return values
    return [
        {"score": value, **{name: listed[index] for name, listed in parts.items()}}
        for index, value in enumerate(values)
    ]


def _unwrap(value: Any) -> Any:
    """Unwrap a list of one number."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _require_count(values: Any, name: str, count: int) -> list[Any]:
    if count == 1 and not isinstance(values, list):
        return [values]
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)}" if isinstance(values, list) else _shown(values)
        raise BadReplyError(f"the service was sent {count} answers, and replied with {found} {name}.")
    return values


def _shown(reply: Any) -> str:
    text = json.dumps(reply, ensure_ascii=False)
    return text[:200] + ("..." if len(text) > 200 else "")
