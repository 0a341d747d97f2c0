"""Sends questions to a judge's endpoint, with votes, cached replies, retries of unreadable replies, and a budget."""

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from annotation.remote.client import BadReplyError, Client, WrongEndpointError, run_concurrently
from annotation.remote.parsing import ReplyParser
from annotation.remote.replies import Reply, ReplyCache, parse_reply
from annotation.remote.spending import Spending
from annotation.remote.templates import RUBRIC, Question
from annotation.samples import Sample
from annotation.scorers.base import Opening
from annotation.scorers.remote import MAX_VOTES, JudgeSettings
from contracts.attempt import report_within
from contracts.errors import TransientError, UserError
from contracts.faults import Fault, Tolerance
from contracts.records import Message, Rollout

TOP_LOGPROBS = 20
"""`top_logprobs` of a request: the most alternatives per token that servers return."""


FIRST_JUDGEMENTS = 16
"""If none of this many first judgements can be read, the stage stops, since further ones would only cost money."""
TOLERANT = 0.5
"""With a max_dropped of at least this, the stage continues nevertheless."""
READ_MARKER = "judged"
"""Name of a marker file in the stage's state: a judgement has been read, by this process or an earlier one."""
MAX_SHOWN = 200
"""Maximum characters of a reply in a message."""


@dataclass(frozen=True)
class Inquiry:
    """One question to the judge, which is asked once per vote."""

    sample: Sample
    """The sample that it is about; of a comparison, the first one."""
    messages: list[dict[str, str]]


@dataclass
class InquiryResult:
    """The result of an inquiry."""

    votes: list[tuple[float, str] | None]
    """For each vote, the number that was read and the text of the reply; None if no number could be read."""
    fault: Fault | None = None
    """The first request that failed."""

    @property
    def values(self) -> list[float]:
        """The numbers of the votes that have one."""
        return [vote[0] for vote in self.votes if vote is not None]

    @property
    def texts(self) -> list[str]:
        """The texts of the votes that have a number."""
        return [vote[1] for vote in self.votes if vote is not None]

    @property
    def mean(self) -> float:
        """Mean of the votes' numbers."""
        return sum(self.values) / len(self.values)


class JudgeClient:
    """Sends inquiries to the configured endpoint, and reads numbers from the replies."""

    def __init__(self, config: JudgeSettings, parse: ReplyParser, opening: Opening) -> None:
        self.config, self.parse = config, parse
        self.cache = ReplyCache(config.cache)
        self.client = Client(
            [config.base], key_variable=config.key_variable, timeout=config.timeout, retries=config.retries
        )
        self.spending = Spending(
            opening.state, max_tokens=config.max_tokens_total, max_cost=config.max_cost, prices=config.prices
        )
        self.tolerance = Tolerance(config.fail_on_error, opening.samples)
        self.counts: dict[str, int] = {}
        self.unread = ""
        """Description of a reply in the last shard that could not be read; empty if all could."""
        self._mark = opening.state / READ_MARKER
        self._any_read = self._mark.exists()
        self._failed = 0
        self._in_flight: dict[str, asyncio.Future[Reply]] = {}

    def ask(self, inquiries: Sequence[Inquiry], samples: Sequence[Sample]) -> list[InquiryResult]:
        """Send all inquiries and return their results; `samples` are all samples of the shard, for the counts.

        Raises:
            UserError: every request would fail, a budget is used up, or more requests failed than are tolerated.
            TransientError: the endpoint is unavailable, and no failure is tolerated.
        """
        votes = self.config.votes
        found: list[list[tuple[float, str] | None]] = [[None] * votes for _ in inquiries]
        faults: dict[int, Fault] = {}
        self.counts = {"answers": 0, "answers_without_reading": 0}
        self.unread = ""
        unread: dict[int, Reply] = {}
        done = 0

        async def judge(number: int) -> None:
            nonlocal done
            index, vote = divmod(number, votes)
            try:
                given = await self._vote(inquiries[index], vote)
                if isinstance(given, Reply):
                    unread[number] = given
                    self._note_unread(inquiries[index], given)
                else:
                    found[index][vote] = given
                    self._note_read()
            except (WrongEndpointError, _StageError):
                raise
            except (UserError, TransientError) as error:
                named = type(error)(f"the judge at {inquiries[index].sample}: {error}")
                if index not in faults:
                    faults[index] = Fault(named)
                    self.tolerance.record(faults[index])
            done += 1
            report_within(done * len(samples) // (votes * len(inquiries)), len(samples), "samples")

        try:
            run_concurrently(self.client, votes * len(inquiries), judge, self.config.concurrency)
        except _StageError as error:
            raise error.error from error
        if unread:
            first = min(unread)
            self.unread = self._quoted(inquiries[first // votes], unread[first])
        self.counts |= self.spending.counts(samples) | {"requests_repeated": self.client.retried}
        self.client.retried = 0
        return [InquiryResult(given, faults.get(index)) for index, given in enumerate(found)]

    def _note_read(self) -> None:
        if not self._any_read:
            self._any_read = True
            self._mark.touch()

    def _note_unread(self, inquiry: Inquiry, reply: Reply) -> None:
        """Raise if none of the first judgements could be read."""
        self._failed += 1
        if not self._any_read and self._failed >= FIRST_JUDGEMENTS and self.config.max_dropped < TOLERANT:
            raise _StageError(
                UserError(
                    f"none of the first {FIRST_JUDGEMENTS} judgements could be read, so no more are paid for. "
                    f"{self._quoted(inquiry, reply)}, or set max_dropped={TOLERANT:g} or more if most may be lost."
                )
            )

    def _quoted(self, inquiry: Inquiry, reply: Reply) -> str:
        """The beginning of a message: a reply that could not be read, shortened and without the key, and how to fix
        it."""
        text, form = self.client.redacted(reply.text), self.config.extraction
        shown = f"{text[:MAX_SHOWN]!r}{'...' if len(text) > MAX_SHOWN else ''}" if text else "nothing"
        if reply.finish_reason == "length" and form != "logprobs":
            ending, fix = f", cut off by max_tokens={self.config.max_tokens}.", "Raise max_tokens"
        else:
            key = "json_key" if form == "json" else "pattern"
            ending = f", in which extraction={form} finds no judgement."
            fix = f"Have the question (rubric, template, instructions) ask for that form, set {key} to match the reply"
        return f"For {inquiry.sample}, for example, the judge replied {shown}{ending} {fix}, use another model"

    async def _vote(self, inquiry: Inquiry, vote: int) -> tuple[float, str] | Reply:
        """The number and text of a vote. A reply without a number is requested again, up to `asks` times in all; then
        the last reply is returned."""
        for ask in range(self.config.asks):
            reply = await self._reply_to(inquiry, vote + MAX_VOTES * ask)
            self.counts["answers"] += 1
            value = self.parse(reply)
            if value is not None:
                return value, reply.text
            self.counts["answers_without_reading"] += 1
        return reply

    async def _reply_to(self, inquiry: Inquiry, number: int) -> Reply:
        """The reply of this number: from the cache, from an identical request in flight, or from a new request."""
        body = _body(self.config, inquiry.messages, number)
        key = self.cache.key(body, number)
        if (reply := self.cache.get(key)) is not None:
            return reply
        if (waiting := self._in_flight.get(key)) is not None:
            return await asyncio.shield(waiting)
        future = self._in_flight[key] = asyncio.get_running_loop().create_future()
        try:
            reply = await self._request(key, inquiry.sample, body)
        except BaseException as error:
            future.set_exception(error if isinstance(error, Exception) else asyncio.CancelledError())
            future.exception()  # marks it as retrieved, as perhaps nobody waits for it
            raise
        finally:
            del self._in_flight[key]
        future.set_result(reply)
        return reply

    async def _request(self, key: str, sample: Sample, body: dict[str, Any]) -> Reply:
        _as_stage_error(self.spending.require_budget)
        reply: Reply = await self.client.ask("POST", "/chat/completions", body, _parsed_reply)
        _as_stage_error(functools.partial(self.cache.put, key, reply))
        _as_stage_error(functools.partial(self.spending.add, sample, reply))
        return reply


class _StageError(Exception):
    """Wraps an error that ends the stage, because it is not about the current sample."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _as_stage_error(do: Callable[[], None]) -> None:
    try:
        do()
    except Exception as error:
        raise _StageError(error) from error


def _body(config: JudgeSettings, messages: list[dict[str, str]], number: int) -> dict[str, Any]:
    """The request body; requests for the same question differ in `number`."""
    body = {
        "model": config.model,
        "messages": messages,
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "seed": None if config.seed is None else config.seed + number,
        **({"logprobs": True, "top_logprobs": TOP_LOGPROBS} if config.extraction == "logprobs" else {}),
        **config.request,
    }
    return {name: value for name, value in body.items() if value is not None}


def _parsed_reply(reply: Any) -> Reply:
    try:
        return parse_reply(reply)
    except ValueError as error:
        raise BadReplyError(f"the endpoint's reply is not a chat completion: {error}.") from error


def check_question(config: JudgeSettings) -> None:
    """Render a judge's question for an example.

    Raises:
        UserError: the template fails, or does not show the answers that the judge is to score.
    """
    from annotation.remote.templates import COMPARE, RATE

    marks = {name: f"<{name}>" for name in config.template_names}
    rollout = Rollout("0" * 16, (Message("user", "<prompt>"),), (), (), "", 0, "raw", "<answer>")
    question = question_of(config, COMPARE if config.compares else RATE, low=0, high=1)
    known = marks if config.compares else {**marks, "finish_reason": "stop"}
    text = "".join(message["content"] for message in question.messages(rollout, **known))
    for name, mark in marks.items():
        if mark not in text:
            raise UserError(f"the judge's template does not show {{{{ {name} }}}}, so the judge would not see it.")


def question_of(config: JudgeSettings, template: str, **known: Any) -> Question:
    """The question of a judge: the user's template, or the built-in one."""
    if config.template_file is not None:
        try:
            template = config.template_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"template_file {config.template_file} cannot be read: {error}.") from error
    text = config.template if config.template is not None else template
    rubric = config.rubric or RUBRIC
    return Question(
        text, config.instructions, {"rubric": rubric, "form": config.extraction, "key": config.json_key, **known}
    )
