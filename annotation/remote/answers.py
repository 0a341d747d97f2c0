"""What judges have said, kept by what they were asked, so that no answer is ever paid for twice.

One file for each answer, named by the hash of the request without the address that it is sent to: the model's name, the
messages and the sampling parameters, and how often it was asked before in vain. A file appears by a rename, so any
number of processes of any number of runs share a folder, and one that is killed leaves whole files only. What cannot be
read (a disk that lost power) is as good as not there.
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
    """One token of an answer, and what could have stood in its place, with log-probabilities (nats)."""

    text: str
    top: list[tuple[str, float]]


class Said(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a judge has said."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    tokens: list[Token] | None = None
    """Where log-probabilities were asked for."""


class AnswerCache:
    """A folder with answers."""

    def __init__(self, folder: Path | None) -> None:
        """None: `answers` in the folder of Ratchet's own files."""
        self.folder = folder or Path(os.environ.get(HOME) or "~/.cache/ratchet").expanduser() / "answers"

    @staticmethod
    def key(body: dict[str, Any], ask: int) -> str:
        """Of a request that is sent for the `ask`-th time, from 0 on."""
        return digest({"format": FORMAT, "body": body, "ask": ask})

    def get(self, key: str) -> Said | None:
        """What was said, if it is known."""
        try:
            return msgspec.json.decode(self._path(key).read_bytes(), type=Said)
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def put(self, key: str, said: Said) -> None:
        """Keep what was said.

        Raises:
            UserError: the folder cannot be written to.
        """
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, msgspec.json.encode(said), durable=False)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"{path.parent}: {os.strerror(error.errno or 0)}; what the judge says is kept there. Set "
                "cache=DIRECTORY."
            ) from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def said_in(reply: Any) -> Said:
    """What is said in a reply to `/chat/completions`.

    Raises:
        ValueError: it is no such reply; says what is missing.
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
        raise ValueError(f"content is no text, or usage no counts, in {json.dumps(reply)[:200]}")
    reason = choice.get("finish_reason")
    reason = reason if isinstance(reason, str) else None
    return Said(text or "", reason, asked, given, _tokens(choice.get("logprobs")))


def _tokens(logprobs: Any) -> list[Token] | None:
    try:
        return [
            Token(str(item["token"]), [(str(top["token"]), float(top["logprob"])) for top in item["top_logprobs"]])
            for item in logprobs["content"]
        ]
    except (KeyError, TypeError, ValueError):
        return None
