"""The scorer kind `http`: a service that scores batches of answers over HTTP."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from annotation.scorers.base import RewardScorerSettings, ScoreConfig
from annotation.scorers.remote import RemoteSettings, Url
from contracts.config import identity, input_path, runtime
from contracts.declaration import load
from contracts.preflight import Finding, Inspected


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class HttpSettings(RemoteSettings, RewardScorerSettings):
    """Settings of an HTTP service."""

    kind: Literal["http"] = identity()
    """A service that scores many responses per request."""
    url: Annotated[list[Url], BeforeValidator(_listed)] = runtime(min_length=1)
    """The service's address, or those of several identical ones, which share the load."""
    service: str = identity(min_length=1)
    """A name with a version for what the service computes. Only this name is in the stage key, wherever the service
    runs; changing it recomputes the scores."""
    protocol: Literal["ratchet", "openrlhf"] = identity("ratchet")
    """The request and response format: Ratchet's own, or that of OpenRLHF's reward.remote_url."""
    tokenizer: Path | None = input_path(None)
    """For openrlhf: directory of the policy's tokenizer, to decode its tokens."""
    batch_size: int = runtime(16, ge=1)
    """Responses per request."""
    judge_twice: int = runtime(0, ge=0)
    """Responses of each shard that are sent a second time, to check that the score is the same; if it is not, the stage
    stops."""

    opened_by: ClassVar[str] = "annotation.remote.service:RewardService"
    can_reward_tokens: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_protocol(self) -> Self:
        if (self.protocol == "openrlhf") != (self.tokenizer is not None):
            what = (
                "protocol=openrlhf sends the texts of the policy's tokens, and no tokenizer is set. Set "
                "tokenizer=DIRECTORY of the policy."
                if self.tokenizer is None
                else f"tokenizer={self.tokenizer} is for protocol=openrlhf alone, and protocol is {self.protocol}. "
                "Leave it out, or set protocol=openrlhf."
            )
            raise ValueError(what)
        return self

    @property
    def display_name(self) -> str:
        """Name of the service."""
        return self.service

    def server_urls(self) -> list[str]:
        """The URLs that requests go to."""
        return self.url

    def preflight(self, stage: Inspected) -> Iterator[Finding]:
        """Check the key, and whether a server listens at each URL."""
        yield from load("annotation.remote.preflight:check_service")(self, self.url)

    def summary(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """A fact that repeatability depends on the service."""
        return {"repeatable": "as far as the service is"}


class HttpConfig(HttpSettings, ScoreConfig):
    """Score every completion with a service."""
