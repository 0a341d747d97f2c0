"""Reads the texts of tokens from a tokenizer.json, without the tokenizers library."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Vocabulary:
    """Maps token ids of a model to texts."""

    def __init__(self, model: Path | None) -> None:
        self._model = model
        self._texts: dict[int, str] | None = None

    def texts(self, ids: Iterable[int]) -> dict[int, str]:
        """The texts of token ids; ids without a known text are left out."""
        if self._texts is None:
            self._texts = _texts_in(self._model / "tokenizer.json") if self._model else {}
        return {id: self._texts[id] for id in sorted(ids) if id in self._texts}


def _texts_in(file: Path) -> dict[int, str]:
    try:
        tokenizer = json.loads(file.read_bytes())
        model = tokenizer["model"]
        words = model["vocab"]
        pieces: dict[str, int] = (
            words if isinstance(words, dict) else {word[0]: number for number, word in enumerate(words)}
        )
        kinds = _kinds(tokenizer.get("decoder")) | _kinds(tokenizer.get("pre_tokenizer"))
        added = {int(token["id"]): str(token["content"]) for token in tokenizer.get("added_tokens") or ()}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}
    spaced = not kinds & {"ByteLevel", "Metaspace", "WordPiece"} and model.get("type") == "WordLevel"
    found = {number: _text(piece, kinds, spaced) for piece, number in pieces.items()}
    return found | added


def _kinds(part: Any) -> set[str]:
    """The types of a decoder or pre-tokenizer, and of its parts if it is a sequence."""
    if not isinstance(part, dict):
        return set()
    inner = [*(part.get("decoders") or ()), *(part.get("pretokenizers") or ())]
    return {str(part.get("type"))}.union(*map(_kinds, inner))


def _text(piece: str, kinds: set[str], spaced: bool) -> str:
    if "ByteLevel" in kinds:
        try:
            return bytes(_BYTES[letter] for letter in piece).decode(errors="replace")
        except KeyError:
            return piece
    if "WordPiece" in kinds:
        return piece[2:] if piece.startswith("##") else f" {piece}"
    return f" {piece}" if spaced else piece.replace("\u2581", " ")


def _bytes_by_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's `bytes_to_unicode`, inverted)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _bytes_by_letter()
