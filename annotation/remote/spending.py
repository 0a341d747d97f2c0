"""Records the tokens that a stage has paid for, by sample, and enforces its budget."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from annotation.remote.replies import Reply
from annotation.samples import Sample
from annotation.workers.journal import complete_lines
from contracts.errors import UserError
from contracts.files import process_name

PATTERN = "paid-*.jsonl"
MILLION = 1_000_000
Entry = tuple[str, int, int, int]
"""prompt_id and sample index of the sample, prompt_tokens, completion_tokens."""


class Spending:
    """The payments of a stage, recorded in the folder `state` of its artifact, so that they survive a kill."""

    def __init__(
        self, state: Path, *, max_tokens: int | None, max_cost: float | None, prices: tuple[float, float]
    ) -> None:
        """`prices`: prices of a million prompt tokens and of a million completion tokens."""
        self.max_tokens, self.max_cost, self.prices = max_tokens, max_cost, prices
        self._path = state / PATTERN.replace("*", process_name())
        self._paid: list[Entry] = list(complete_lines(state, PATTERN, Entry))
        self.prompt_tokens = sum(entry[2] for entry in self._paid)
        self.completion_tokens = sum(entry[3] for entry in self._paid)

    def require_budget(self) -> None:
        """Raise UserError if a limit is reached."""
        tokens = self.prompt_tokens + self.completion_tokens
        spent = cost(self.prompt_tokens, self.completion_tokens, self.prices)
        if self.max_tokens is not None and tokens >= self.max_tokens:
            self._stop(f"{tokens} tokens, and max_tokens_total is {self.max_tokens}")
        if self.max_cost is not None and spent >= self.max_cost:
            self._stop(f"{spent:.6g}, and max_cost is {self.max_cost:g}")

    def _stop(self, what: str) -> None:
        raise UserError(
            f"the judge has cost {what}. Its replies are kept: raise the limit, and the same command resumes."
        )

    def add(self, sample: Sample, reply: Reply) -> None:
        """Record the payment for a reply.

        Raises:
            UserError: there is a limit, and the server does not report token usage.
        """
        entry = (sample.rollout.prompt_id, sample.completion.sample, reply.prompt_tokens, reply.completion_tokens)
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(entry) + b"\n")
        self._paid.append(entry)
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        limited = self.max_tokens is not None or self.max_cost is not None
        if limited and not reply.prompt_tokens + reply.completion_tokens:
            raise UserError(
                "the endpoint does not say how many tokens an answer took (`usage`), so max_tokens_total and max_cost "
                "cannot be enforced. Leave them out, and limit the key where it was made."
            )

    def counts(self, samples: Iterable[Sample]) -> dict[str, int]:
        """The payments for these samples, as counts for the manifest."""
        asked = {(sample.rollout.prompt_id, sample.completion.sample) for sample in samples}
        paid = [entry for entry in self._paid if entry[:2] in asked]
        return {
            "answers_paid": len(paid),
            "prompt_tokens_paid": sum(entry[2] for entry in paid),
            "completion_tokens_paid": sum(entry[3] for entry in paid),
        }


def cost(prompt_tokens: int, completion_tokens: int, prices: tuple[float, float]) -> float:
    """Cost of tokens, at prices per million."""
    return (prompt_tokens * prices[0] + completion_tokens * prices[1]) / MILLION
