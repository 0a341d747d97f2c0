"""An async HTTP client for scorers: concurrent requests in one process, with a deadline each, retries and clear errors.

Errors are of three types. An error that every request would meet (a rejected key, a path that does not exist, a
redirect) is a `WrongEndpointError` at once. An error that may pass (no connection, 429, 5xx, a timeout, a truncated
reply) is retried after an exponential, jittered pause, or after the pause that the server asks for, and is a
`TransientError` in the end. An error of one request or of its reply is a `UserError`, which makes its samples fail; a
reply of the wrong form (`BadReplyError`) is retried first.
"""

import asyncio
import email.utils
import json
import os
import random
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from contracts import stopping
from contracts.attempt import beat
from contracts.errors import TransientError, UserError

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""First and longest pause before a retry, in seconds; pauses double, and up to half of each is random."""
LONGEST_WAIT = 600.0
"""Longest Retry-After that is waited for, in seconds; if a server asks for more, the request fails."""
POLL_SECONDS = 0.25
"""Interval at which waiting tasks check whether the stage is to stop, in seconds."""
MAX_BYTES = 64 << 20
"""Maximum size of a reply."""
MAX_SHOWN = 200
"""Maximum characters of a reply in a message."""
CONNECT_SECONDS = 10.0
RETRIED_STATUSES = frozenset({408, 409, 425, 429})
"""Statuses below 500 that are retried."""
FATAL_STATUSES = frozenset({401, 402, 403, 404, 405, 410, 501})
"""Statuses that every request would meet."""


class WrongEndpointError(UserError):
    """An error that every request to this server would meet."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class BadReplyError(UserError):
    """A reply of the wrong form: an HTML page, truncated JSON, or the wrong number of results."""


class ServerError(TransientError):
    """A 5xx status that suggests that the server failed on the content of the request."""


class Halted(Exception):  # noqa: N818 - not an error: another request has raised one
    """The stage is stopping, and this request was not sent."""


class Client:
    """An HTTP client for one server, or for several identical ones."""

    def __init__(self, urls: list[str], *, key_variable: str | None, timeout: float, retries: int) -> None:
        """Prepare the client; `RemoteSettings` documents the arguments.

        Raises:
            UserError: the environment variable with the key is not set.
        """
        self.urls, self.timeout, self.retries = urls, timeout, retries
        self.retried = 0
        """Number of retries."""
        self.halted = False
        """Whether no further requests are sent; set by `run_concurrently`."""
        self._key = api_key(key_variable)
        self._resume = 0.0
        self._next = 0

    async def __aenter__(self) -> Self:
        """Open the HTTP session."""
        httpx2 = _import_httpx()
        direct: dict[str, Any] = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(None, connect=min(CONNECT_SECONDS, self.timeout)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=100),
            follow_redirects=False,
            mounts=direct,  # no proxy for local servers
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the HTTP session."""
        await self._http.aclose()

    async def ask(self, method: str, path: str, body: Any, check: Callable[[Any], Any]) -> Any:
        """Send a request, and return what `check` returns for the JSON of the reply.

        Args:
            check: converts the reply; raises `BadReplyError` if it has the wrong form.

        Raises:
            Halted: the request was not sent, because the stage is stopping.
            TransientError: all retries failed with errors that may pass.
            UserError: any other failure.
        """
        pause = FIRST_PAUSE
        for left in range(self.retries, -1, -1):
            await self._wait_until(self._resume)
            url = self.urls[self._next % len(self.urls)] + path
            self._next += 1
            error: Exception
            asked_for = None
            try:
                status, headers, text = await self._send(method, url, body)
                if status < 300:
                    return check(_parsed(url, headers, text, self.redacted))
                asked_for = _retry_after(headers)
                error = self._error(url, status, headers, text)
            except BadReplyError as bad:
                error = BadReplyError(self.redacted(str(bad)))
            except TransientError as transient:
                error = transient
            if not left or not isinstance(error, TransientError | BadReplyError):
                raise error
            if (asked_for or 0) > LONGEST_WAIT:
                raise type(error)(
                    f"{error} It asks for a pause of {asked_for:.0f} s (Retry-After), more than the maximum of "
                    f"{LONGEST_WAIT:.0f} s. Start again then; the replies so far are kept."
                ) from error
            self.retried += 1
            wait = max(pause * random.uniform(0.5, 1.0), asked_for or 0.0)
            if asked_for is not None:  # applies to all requests
                self._resume = max(self._resume, time.monotonic() + asked_for)
            await self._wait_until(time.monotonic() + wait)
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError

    async def _wait_until(self, moment: float) -> None:
        while not self.halted and not stopping.requested():
            left = moment - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(left, POLL_SECONDS))
        raise Halted

    async def _send(self, method: str, url: str, body: Any) -> tuple[int, Any, bytes]:
        """Send a request once; returns status, headers and body of a reply that arrived complete and in time."""
        httpx2 = _import_httpx()
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode(errors="replace")
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(self.timeout):  # for the whole reply, even if it keeps arriving slowly
                async with self._http.stream(method, url, content=content, headers=headers) as reply:
                    received = bytearray()
                    async for part in reply.aiter_bytes():
                        received += part
                        if len(received) > MAX_BYTES:
                            raise BadReplyError(f"{url} sent more than {MAX_BYTES >> 20} MiB.")
                    return reply.status_code, reply.headers, bytes(received)
        except TimeoutError as error:
            raise TransientError(f"{url} has not replied in timeout={self.timeout:g} s.") from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise WrongEndpointError(f"{url} is not a valid URL: {error}.") from error
        except httpx2.DecodingError as error:
            raise BadReplyError(f"{url} sent a reply that cannot be decoded: {self.redacted(str(error))}.") from error
        except httpx2.RequestError as error:
            reason = self.redacted(str(error)) or type(error).__name__
            raise TransientError(f"{url} could not be reached, or closed the connection: {reason}.") from error

    def _error(self, url: str, status: int, headers: Any, content: bytes) -> Exception:
        reply = f"{url} replied {status}{self._quoted(content)}"
        if 300 <= status < 400:
            to = self.redacted(str(headers.get("location", "nowhere")))
            return WrongEndpointError(
                f"{url} replied {status}, a redirect to {to}, which is not followed: answers and the key would go "
                "elsewhere. Set url to where it leads, if you trust that.",
                status,
            )
        if status in FATAL_STATUSES:
            fix = {401: "Check key_variable.", 403: "Check key_variable.", 404: "Check url and model."}
            return WrongEndpointError(f"{reply}. {fix.get(status, 'Check url.')}", status)
        if status in RETRIED_STATUSES or status >= 500:
            return (TransientError if status in (*RETRIED_STATUSES, 502, 503, 504) else ServerError)(f"{reply}.")
        return UserError(f"{reply}.")

    def _quoted(self, content: bytes) -> str:
        text = " ".join(self.redacted(content[: 20 * MAX_SHOWN].decode(errors="replace")).split())
        return f": {text[:MAX_SHOWN]}{'...' if len(text) > MAX_SHOWN else ''}" if text else ""

    def redacted(self, text: str) -> str:
        """A text with the key redacted."""
        return text.replace(self._key, "***") if self._key else text


def run_concurrently(client: Client, count: int, do: Callable[[int], Awaitable[None]], concurrency: int) -> None:
    """Run `do` for each number below `count`, at most `concurrency` at a time.

    When one raises an error, or the stage is asked to stop, no more are started, and those in progress are completed,
    as they may have been paid for.
    """
    asyncio.run(_run_concurrently(client, count, do, concurrency))


async def _run_concurrently(client: Client, count: int, do: Callable[[int], Awaitable[None]], concurrency: int) -> None:
    todo = iter(range(count))
    errors: list[Exception] = []
    client.halted = False

    async def worker() -> None:
        for number in todo:
            try:
                await do(number)
            except Halted:
                return
            except Exception as error:
                errors.append(error)
                client.halted = True
                return
            if client.halted or stopping.requested():
                return

    async with client:
        tasks = {asyncio.ensure_future(worker()) for _ in range(min(concurrency, count))}
        while tasks:
            _, tasks = await asyncio.wait(tasks, timeout=POLL_SECONDS)
            beat()
    if errors:
        raise errors[0]
    if stopping.requested():
        stopping.leave()


def api_key(variable: str | None) -> str | None:
    """The key in an environment variable; None if `variable` is None.

    Raises:
        UserError: the variable is not set, or its value cannot be sent in a header.
    """
    if variable is None:
        return None
    if not (key := os.environ.get(variable, "").strip()):
        raise UserError(
            f"key_variable={variable}, but this environment variable is not set. Set it where you start (export "
            f"{variable}=...): stages inherit it."
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the environment variable {variable} has characters that a key cannot have. Set it again.")
    return key


def _import_httpx() -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise UserError(
            "this environment lacks httpx2, which scorers that call a server need. Install it: pip install httpx2."
        ) from error
    return httpx2


def _parsed(url: str, headers: Any, content: bytes, redacted: Callable[[str], str]) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        kind = str(headers.get("content-type", "")).partition(";")[0]
        start = " ".join(redacted(content[: 20 * MAX_SHOWN].decode(errors="replace")).split())[:MAX_SHOWN]
        raise BadReplyError(
            f"{url} replied with {kind or 'something'} that is not JSON: {start!r}. Check that url is that of the API."
        ) from error


def _retry_after(headers: Any) -> float | None:
    """The Retry-After header in seconds, whether it is a number or a date (RFC 9110, 10.2.3)."""
    text = str(headers.get("retry-after", "")).strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if seconds == seconds else None


def is_reachable(url: str, seconds: float) -> str | None:
    """Try to connect to a URL's host; returns the error, or None if a server listens."""
    import socket

    parts = urlsplit(url)
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        with socket.create_connection((parts.hostname or "", port), timeout=seconds):
            return None
    except (OSError, KeyError, ValueError) as error:
        return str(error)
