"""Preflight checks of the servers that scorers call, before a run starts."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from annotation.remote.asking import check_question
from annotation.remote.client import BadReplyError, Client, WrongEndpointError, api_key, is_reachable
from annotation.scorers.remote import JudgeSettings, RemoteSettings
from contracts.errors import TransientError, UserError, did_you_mean
from contracts.preflight import Finding

SECONDS = 10.0
MAX_NAMES = 5


def check_judge(config: JudgeSettings) -> Iterator[Finding]:
    """Check a judge's question template and key, and whether its endpoint serves the model."""
    check_question(config)
    api_key(config.key_variable)
    later = "It may be started later; the stage waits for it as long as retries allows."
    try:
        served = asyncio.run(_models(config))
    except WrongEndpointError as error:
        unsupported = error.status in (404, 405, 501)  # not all servers list their models
        yield Finding("warning" if unsupported else "error", str(error))
        return
    except TransientError as error:
        yield Finding("warning", str(error), later)
        return
    except UserError as error:
        yield Finding("warning", str(error))
        return
    if config.model not in served:
        names = ", ".join(served[:MAX_NAMES]) + (", ..." if len(served) > MAX_NAMES else "")
        found = f"{config.base} serves no model {config.model!r}, but {names or 'none'}."
        yield Finding("error", f"{found}{did_you_mean(config.model, served)}", "Set model to one that it serves.")
    else:
        yield Finding("ok", f"{config.base} serves {config.model}")


async def _models(config: JudgeSettings) -> list[str]:
    client = Client([config.base], key_variable=config.key_variable, timeout=SECONDS, retries=0)
    async with client:
        served: list[str] = await client.ask("GET", "/models", None, _names)
        return served


def _names(reply: Any) -> list[str]:
    try:
        return [str(model["id"]) for model in reply["data"]]
    except (KeyError, TypeError) as error:
        raise BadReplyError(f"its reply is not a list of models: {json.dumps(reply)[:200]}") from error


def check_service(config: RemoteSettings, urls: list[str]) -> Iterator[Finding]:
    """Check a service's key, and whether a server listens at each of its URLs."""
    api_key(config.key_variable)
    for url in urls:
        if problem := is_reachable(url, SECONDS):
            yield Finding(
                "warning",
                f"no server listens at {url}: {problem}.",
                "It may be started later; the stage waits for it as long as retries allows.",
            )
        else:
            yield Finding("ok", f"a server listens at {url}")
