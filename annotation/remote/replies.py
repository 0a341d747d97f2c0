"""A cache of judges' replies, so that no reply is ever paid for twice.

There is one file per reply, named by a hash of the request (the model's name, the messages, the sampling parameters and
the number of earlier attempts) but not of the URL. Files appear by a rename, so any number of processes and runs can
share a folder, and a killed process leaves only complete files. A file that cannot be read (after a power loss) counts
as missing.
"""

import json
import os
from pathlib import Path
from typing import Any

import msgspec

from contracts.errors import UserError
from contracts.files import write_atomically
from contracts.fingerprint import digest

HOME = "RATCHET_HOME"
FORMAT = 1


class Token(msgspec.Struct, array_like=True, frozen=True):
    """One token of a reply, and the most likely alternatives with their log-probabilities (nats)."""

    text: str
    top: list[tuple[str, float]]


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """A judge's reply."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    tokens: list[Token] | None = None
    """The reply's tokens, if log-probabilities were requested."""


class ReplyCache:
    """A folder of cached replies."""

    def __init__(self, folder: Path | None) -> None:
        """`folder` None: `answers` in Ratchet's home directory."""
        self.folder = folder or Path(os.environ.get(HOME) or "~/.cache/ratchet").expanduser() / "answers"

    @staticmethod
    def key(body: dict[str, Any], ask: int) -> str:
        """The cache key of a request on its attempt number `ask`, from 0."""
        return digest({"format": FORMAT, "body": body, "ask": ask})

    def get(self, key: str) -> Reply | None:
        """The cached reply, or None."""
        try:
            return msgspec.json.decode(self._path(key).read_bytes(), type=Reply)
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def put(self, key: str, reply: Reply) -> None:
        """Store a reply.

        Raises:
            UserError: the folder is not writable.
        """
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, msgspec.json.encode(reply), durable=False)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"{path.parent}: {os.strerror(error.errno or 0)}; the judge's replies are cached there. Set "
                "cache=DIRECTORY."
            ) from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def parse_reply(reply: Any) -> Reply:
    """Parse the response body of `/chat/completions`.

    Raises:
        ValueError: it is not a valid response; the message says what is missing.
    """
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        text = message.get("content")
        usage = reply.get("usage") or {}
        asked, given = (usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens"))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no choices[0].message in {json.dumps(reply)[:200]}") from error
    if not (text is None or isinstance(text, str)) or not all(
        type(count) is int and count >= 0 for count in (asked, given)
    ):
        raise ValueError(f"content is not a text, or usage has no counts, in {json.dumps(reply)[:200]}")
    reason = choice.get("finish_reason")
    reason = reason if isinstance(reason, str) else None
    return Reply(text or "", reason, asked, given, _tokens(choice.get("logprobs")))


def _tokens(logprobs: Any) -> list[Token] | None:
    try:
        return [
            Token(str(item["token"]), [(str(top["token"]), float(top["logprob"])) for top in item["top_logprobs"]])
            for item in logprobs["content"]
        ]
    except (KeyError, TypeError, ValueError):
        return None
