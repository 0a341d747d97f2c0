"""What can be known of a model directory without torch."""

import json
from pathlib import Path
from typing import Any

import msgspec

from contracts.errors import UserError
from contracts.fingerprint import weight_files

VALUE_HEAD = "value_head/model.safetensors"
"""File of a policy that is its own critic: one tensor `weight` [1, hidden size]; engines do not see it there."""
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "sentencepiece.bpe.model")


class ModelInfo(msgspec.Struct, frozen=True):
    """Facts of a model directory's configuration files."""

    path: Path
    architecture: str
    context_length: int | None
    labels: int | None
    """Outputs of a sequence classifier; None for other models."""
    has_chat_template: bool

    @classmethod
    def read(cls, path: Path) -> "ModelInfo":
        """Read a model directory.

        Raises:
            UserError: it does not exist, is no model, or has no safetensors weights.
        """
        weight_files(path)
        config = _read_json(path / "config.json")
        architecture = (config.get("architectures") or ["unknown"])[0]
        labels = None
        if architecture.endswith("ForSequenceClassification"):
            labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
        tokenizer_config = path / "tokenizer_config.json"
        template = (path / "chat_template.jinja").is_file() or (
            tokenizer_config.is_file() and bool(_read_json(tokenizer_config).get("chat_template"))
        )
        text_config = config.get("text_config", config)
        context = text_config.get("max_position_embeddings", text_config.get("n_positions"))
        return cls(path, architecture, context, labels, template)

    def require_causal(self) -> None:
        """Raise UserError unless this is a causal language model."""
        if not self.architecture.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")):
            raise UserError(
                f"{self.path} is a {self.architecture}; a policy must be a causal language model (…ForCausalLM)."
            )

    @property
    def has_tokenizer(self) -> bool:
        """Whether the directory holds a tokenizer's vocabulary."""
        return any((self.path / name).is_file() for name in VOCABULARIES)

    def require_chat_template(self) -> None:
        """Raise UserError unless there is a tokenizer with a chat template."""
        if not self.has_tokenizer:
            raise UserError(
                f"{self.path} has no tokenizer ({', '.join(VOCABULARIES)}). Save the tokenizer into it with "
                "save_pretrained."
            )
        if not self.has_chat_template:
            raise UserError(
                f"the tokenizer of {self.path} has no chat template, so a conversation cannot be turned into tokens. "
                "Use an instruction-tuned model, or put a chat_template.jinja into the directory."
            )

    def require_classifier_start(self) -> None:
        """Raise UserError unless a classifier with one label can be trained from this: it is one, or a causal model."""
        if self.labels is None:
            self.require_causal()
        else:
            self.require_one_label()

    def require_one_label(self) -> None:
        """Raise UserError unless this is a reward model with a single output."""
        if self.labels != 1:
            found = "no classifier" if self.labels is None else f"{self.labels} labels"
            raise UserError(
                f"reward model {self.path} is a {self.architecture} with {found}; a Bradley-Terry reward model is a "
                "…ForSequenceClassification with exactly one (num_labels=1)."
            )

    @property
    def has_value_head(self) -> bool:
        """Whether this is a policy that is its own critic."""
        return (self.path / VALUE_HEAD).is_file()

    def require_length(self, tokens: int, what: str) -> None:
        """Raise UserError when `tokens` do not fit the model's context."""
        if self.context_length is not None and tokens > self.context_length:
            raise UserError(
                f"{what} is {tokens} tokens, but the context of {self.path} is {self.context_length} "
                "(max_position_embeddings). Lower it to at most that."
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. Download or save the model again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object. Download or save the model again.")
    return data
