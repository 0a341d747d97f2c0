"""Settings shared by scorers that call a server: its address, request limits, and for judges prompts and budgets."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, model_validator

from annotation.scorers.base import ScorerSettings
from contracts.config import identity, input_path, runtime
from contracts.declaration import load
from contracts.preflight import Finding, Inspected

MAX_VOTES = 1000
NO_JUDGEMENT = "no_judgement"
"""Reason in the drop ledger: no score could be read from the judge's replies."""
COMPLETIONS = "/chat/completions"


def checked_url(value: str) -> str:
    """Check a URL, and return it without a trailing slash.

    Raises:
        ValueError: it is not an HTTP URL, or contains credentials.
    """
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it is not an HTTP URL. Write one like http://127.0.0.1:8000/v1.")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "it holds a name or a password, and a configuration is written to files. Take it out, and name an "
            "environment variable with the key in key_variable."
        )
    return value.rstrip("/")


Url = Annotated[str, AfterValidator(checked_url)]


class RemoteSettings(ScorerSettings):
    """Settings of scorers that call a server."""

    key_variable: str | None = runtime(None, min_length=1)
    """Environment variable with the key (a bearer token) of the server; the key itself is stored nowhere."""
    concurrency: int = runtime(16, ge=1)
    """Maximum number of concurrent requests, all from one process."""
    timeout: float = runtime(120.0, gt=0)
    """Seconds for one request, until the reply is complete."""
    retries: int = runtime(5, ge=0)
    """Retries of a request after a connection failure, 429, 5xx, a timeout or an incomplete reply, with exponential
    backoff from 1 s, or as long as the server says (Retry-After)."""


class JudgeSettings(RemoteSettings):
    """Settings of judges behind an OpenAI-compatible endpoint."""

    url: Url = runtime()
    """The API's base URL, such as http://127.0.0.1:8000/v1; requests go to /chat/completions. It is not in the stage
    key: the same model may be served elsewhere."""
    model: str = identity(min_length=1)
    """The model's name at the endpoint."""
    rubric: str | None = identity(None, min_length=1)
    """The criterion, instead of that of the built-in prompt."""
    template: str | None = identity(None, min_length=1)
    """The whole question (Jinja), instead of the built-in prompt."""
    template_file: Path | None = input_path(None)
    """A file with the template, instead of `template`."""
    instructions: str | None = identity(None, min_length=1)
    """A system message before the question (Jinja)."""
    extraction: Literal["pattern", "json", "logprobs"] = identity("pattern")
    """How the rating is read: by a pattern, as JSON, or as the mean of the possible values at one token, weighted by
    their probabilities (G-Eval)."""
    pattern: str | None = identity(None, min_length=1)
    """Regular expression whose first group is the judgement; its last match in the reply counts."""
    json_key: str = identity("judgement", min_length=1)
    """Key of the JSON object with the judgement."""
    temperature: float | None = identity(0.0, ge=0)
    """Sampling temperature of the judge; null leaves it to the server, also for max_tokens and seed."""
    max_tokens: int | None = identity(1024, ge=1)
    """Maximum length of the judge's reply. A truncated reply is not read, except with logprobs."""
    seed: int | None = identity(0, ge=0)
    """Seed of the first vote; each further request of the same question has another."""
    request: dict[str, Any] = identity({})
    """Further keys of the request body, such as {reasoning_effort: low, response_format: {type: json_object}}."""
    votes: int = identity(1, ge=1, le=MAX_VOTES)
    """Votes per question; the score is their mean."""
    asks: int = identity(3, ge=1, le=100)
    """Maximum number of requests for the same vote, until a reply has a judgement."""
    cache: Path | None = runtime(None)
    """Folder of cached replies, for all runs; by default ~/.cache/ratchet/answers ($RATCHET_HOME/answers)."""
    max_tokens_total: int | None = runtime(None, ge=1)
    """Stop the stage when it has paid for this many tokens, of prompts and replies; nothing is lost."""
    max_cost: float | None = runtime(None, gt=0)
    """Stop the stage when it has paid this much, by the two prices; nothing is lost."""
    price_prompt: float = runtime(0.0, ge=0)
    """Price of a million prompt tokens."""
    price_completion: float = runtime(0.0, ge=0)
    """Price of a million reply tokens."""

    template_names: ClassVar[tuple[str, ...]]
    """Variables that the question must use."""

    @model_validator(mode="after")
    def _check_judge(self) -> Self:
        if self.url.endswith(COMPLETIONS):
            raise ValueError(f"url is the API's base, to which {COMPLETIONS} is added. Write {self.base}.")
        if self.template is not None and self.template_file is not None:
            raise ValueError("template and template_file are two questions. Take one of them out.")
        if self.rubric is not None and (self.template or self.template_file):
            raise ValueError("rubric is for the built-in question. Write it into your own, and take rubric out.")
        if self.votes > 1 and self.temperature == 0:
            raise ValueError(f"votes={self.votes} at temperature=0 are one vote. Set temperature=1, or votes=1.")
        if self.max_cost is not None and not self.price_prompt + self.price_completion:
            raise ValueError("max_cost needs prices. Set price_prompt and price_completion (of a million tokens).")
        if self.pattern is not None:
            if self.extraction == "json":
                raise ValueError("pattern is not for extraction=json. Set json_key, or take it out.")
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern is not a regular expression: {error}.") from error
            if not groups:
                raise ValueError("pattern has no group. Put parentheses around the judgement.")
        return self

    def server_urls(self) -> list[str]:
        """The URLs that requests go to."""
        return [self.url]

    @property
    def base(self) -> str:
        """The API's base URL, without the path of the request."""
        return self.url.removesuffix(COMPLETIONS)

    @property
    def prices(self) -> tuple[float, float]:
        """Prices of a million prompt tokens and a million reply tokens."""
        return self.price_prompt, self.price_completion

    @property
    def display_name(self) -> str:
        """Name of the model."""
        return self.model

    def check(self) -> None:
        """Check the question's template."""
        load("annotation.remote.asking:check_question")(self)

    def preflight(self, stage: Inspected) -> Iterator[Finding]:
        """Check the question's template and the key, and whether the endpoint serves the model."""
        yield from load("annotation.remote.preflight:check_judge")(self)

    def fixes(self, unread: str) -> dict[str, str]:
        """Advice about replies that could not be read: an example, and how to fix it."""
        return {NO_JUDGEMENT: f"{unread},"} if unread else {}

    def summary(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """The cost, if there are prices, and a fact that only the cached replies are repeatable."""
        facts: dict[str, Any] = {"repeatable": "by the answers that are kept; a judge that is asked anew may say else"}
        if sum(self.prices):
            tokens = (counts.get("prompt_tokens_paid", 0), counts.get("completion_tokens_paid", 0))
            facts["cost"] = load("annotation.remote.spending:cost")(*tokens, self.prices)
        return facts
