"""Loads tokenizers from tokenizer.json alone, regardless of the class that tokenizer_config.json names.

transformers rebuilds the pre-tokenizer and the decoder from the class name, differently from version to version: a
byte-level BPE named LlamaTokenizerFast loses its spaces in one version and keeps them in the next. Here the file is
loaded as it is, with the special tokens that the directory names, so that all environments tokenize alike.
"""

from pathlib import Path
from typing import Any

from contracts.errors import UserError
from contracts.template import NAMED_TOKENS, read_json, special_tokens

OTHER_VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.json")


def require_tokenizer(path: Path) -> None:
    """Raise UserError unless a model directory has a tokenizer.json, which all environments read alike."""
    if (path / "tokenizer.json").is_file():
        return
    other = next((name for name in OTHER_VOCABULARIES if (path / name).is_file()), None)
    if other is None:
        raise UserError(f"{path} has no tokenizer (tokenizer.json). Save the tokenizer into it with save_pretrained.")
    program = (
        f"from transformers import AutoTokenizer as T; T.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
    )
    raise UserError(
        f"the tokenizer of {path} is {other} alone, which the stages' environments do not read alike. Convert it once "
        f'to tokenizer.json: $(pipeline env python generation) -c "{program}"'
    )


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a model directory as a transformers PreTrainedTokenizerFast.

    Truncation and padding are disabled even if the file enables them, and decoding does not clean up spaces.

    Raises:
        UserError: there is no tokenizer.json, or it cannot be read.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    require_tokenizer(path)
    logging.set_verbosity_error()  # it warns about conversations longer than the context, which the stages count
    config = read_json(path / "tokenizer_config.json")
    named = {name: token for name, token in special_tokens(path).items() if name in NAMED_TOKENS}
    extra = [_content(token) for token in _extra(path, config)]
    added = {int(key): AddedToken(**value) for key, value in (config.get("added_tokens_decoder") or {}).items()}
    file = path / "tokenizer.json"
    try:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(file),
            clean_up_tokenization_spaces=False,
            additional_special_tokens=extra,
            added_tokens_decoder=added,
            **named,
        )
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library raises plain Exception
            raise
        raise UserError(
            f"{file} cannot be read as a tokenizer: {error}. Download or save the tokenizer again."
        ) from error
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _extra(path: Path, config: dict[str, Any]) -> list[Any]:
    """The special tokens that have no name."""
    for found in (config, read_json(path / "special_tokens_map.json")):
        for name in ("additional_special_tokens", "extra_special_tokens"):
            value = found.get(name)
            if value:
                return list(value.values()) if isinstance(value, dict) else list(value)
    return []


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
