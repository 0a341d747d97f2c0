"""Retries requests to the Hub, and turns what they raise into messages."""

import errno
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from contracts.errors import UserError, as_user_error, is_transient, system_code
from contracts.secrets import TOKEN
from pipelines.hub.remote import RefusedError
from pipelines.hub.uploads import DamagedError

T = TypeVar("T")
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
REPORT_AFTER = 20.0
"""Seconds of failing after which a failure is reported although it is still being retried."""
RETRIED_STATUSES = (408, 409, 412, 425, 429)
"""HTTP statuses worth a retry; 412 means a stale parent commit: another commit came in between."""
RETRY_NOTE = "The request is retried for a while; `pipeline push` tries again later."
FIXES = {
    401: "The Hub refuses the token. Give a valid one (HF_TOKEN, or `hf auth login`), then `pipeline push`.",
    403: "The token may not write there. Give one that may (HF_TOKEN, or `hf auth login`), then `pipeline push`.",
    404: "Check its name, and that the token may see it.",
}


@dataclass(frozen=True)
class Failure:
    """The reason why something could not be pushed."""

    text: str
    lasts: bool
    """Whether it is permanent: no retry succeeds until somebody fixes the cause."""
    pause: float = 0.0
    """Seconds to wait before the next try, as the Hub has asked."""


class PushError(Exception):
    """Something could not be pushed, in spite of all retries."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


def with_retries(
    action: Callable[[], T],
    repo: str,
    patience: Callable[[], float],
    on_delay: Callable[[Failure], object] = lambda failure: None,
    on_first_failure: Callable[[Failure], object] = lambda failure: None,
) -> T:
    """Call an idempotent action until it succeeds, with exponential backoff.

    Args:
        action: has to look first at what an earlier call has already done.
        patience: returns for how many seconds to retry; called before every retry.
        on_delay: called with each failure after `REPORT_AFTER` seconds of retrying.
        on_first_failure: called with the first failure.

    Raises:
        PushError: the failure is permanent, or the patience has run out.
    """
    start, pause, is_first = time.monotonic(), FIRST_PAUSE, True
    while True:
        try:
            return action()
        except Exception as error:
            failure = failure_of(error, repo)
            wait = max(failure.pause, pause * random.uniform(0.5, 1.0))
            if failure.lasts or time.monotonic() + wait - start > patience():
                raise PushError(failure) from error
        if is_first:
            on_first_failure(failure)
            is_first = False
        if time.monotonic() - start > REPORT_AFTER:
            on_delay(failure)
        time.sleep(wait)
        pause = min(LONGEST_PAUSE, 2 * pause)


def failure_of(error: Exception, repo: str) -> Failure:
    """Classify an exception.

    Raises:
        Exception: the error itself, where it is a bug.
    """
    chain = list(_causes(error))
    for found in chain:
        if isinstance(found, RefusedError | DamagedError | UserError):
            return Failure(str(found), lasts=True)
        if isinstance(found, FileNotFoundError) and found.filename and not isinstance(found, HfHubHTTPError):
            text = f"{found.filename} is not there any more: it was deleted before it could be pushed."
            return Failure(text, lasts=True)
        if isinstance(found, OfflineModeIsEnabled):
            return Failure("HF_HUB_OFFLINE is set, so nothing is pushed. Unset it, then `pipeline push`.", lasts=True)
        if system_code(found) in (errno.ENOSPC, errno.EDQUOT) and (full := as_user_error(found)) is not None:
            return Failure(str(full), lasts=True)
        if isinstance(found, HfHubHTTPError) and found.response is not None:
            return _http_failure(found, repo)
    for found in chain:
        if is_transient(found) or type(found).__module__.partition(".")[0] in ("httpx", "httpx2"):
            text = f"{repo}: the Hub could not be reached: {_message_of(found)}. {RETRY_NOTE}"
            return Failure(text, lasts=False)
    raise error


def _http_failure(error: HfHubHTTPError, repo: str) -> Failure:
    status = error.response.status_code
    if status in RETRIED_STATUSES or status >= 500:
        text = f"{repo}: the Hub answers {status}: {_message_of(error)}. {RETRY_NOTE}"
        return Failure(text, lasts=False, pause=_retry_after(error))
    if status == 404 and not isinstance(error, RepositoryNotFoundError):
        return Failure(f"{repo}: the Hub answers {status}: {_message_of(error)}.", lasts=False)  # deleted meanwhile
    fix = FIXES.get(status, "")
    return Failure(f"{repo}: the Hub answers {status}: {_message_of(error)}. {fix}".rstrip(), lasts=True)


def _retry_after(error: HfHubHTTPError) -> float:
    """Seconds in the header Retry-After, which is a number or a date; 0 without one."""
    asked = error.response.headers.get("retry-after", "")
    if re.fullmatch(r"\d+(\.\d+)?", asked):
        return float(asked)
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return 0.0


def _causes(error: BaseException | None) -> Iterator[Exception]:
    """An error, then its causes."""
    while isinstance(error, Exception):
        yield error
        error = error.__cause__ or error.__context__


def _message_of(error: Exception) -> str:
    """The message of an error in one line, without tokens and without the signatures in URLs."""
    message = getattr(error, "server_message", None) or next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.sub(r"\?\S+", "?...", TOKEN.sub("(hidden)", message)).rstrip(". ")
