"""Reads and checks a model directory's configuration, without torch."""

import json
from pathlib import Path
from typing import Any

import msgspec

from contracts.architectures import Support, require_supported, support_of, text_settings
from contracts.errors import UserError
from contracts.fingerprint import weight_files
from contracts.tokenizer import OTHER_VOCABULARIES, require_tokenizer

VALUE_HEAD = "value_head/model.safetensors"
"""File of a policy that is its own critic: one tensor `weight` [1, hidden size]; engines do not load it."""
MASTER = "master"
"""Folder in a bfloat16 checkpoint with the remainders to fp32 (modeling/master.py), for the next training."""
PROCESS_MODEL = "Qwen2ForProcessRewardModel"
"""The class of Qwen2.5-Math-PRM, a token classifier whose head has two layers; transformers does not have it."""
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", PROCESS_MODEL)
CONTEXT_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")


class ModelInfo(msgspec.Struct, frozen=True):
    """Facts of a model directory's configuration files."""

    path: Path
    architecture: str
    context_length: int | None
    labels: int | None
    """Number of outputs of a sequence or token classifier; None for other models."""
    has_chat_template: bool
    settings: dict[str, Any]
    """The content of config.json."""
    quantised: str | None = None
    """The quantisation method of the weights, if any."""
    vocabulary_size: int | None = None
    """Number of rows of the embedding."""

    @classmethod
    def read(cls, path: Path) -> "ModelInfo":
        """Read a model directory.

        Raises:
            UserError: it does not exist, is not a model, lacks some or all of its weights, or they are quantised.
        """
        weight_files(path)
        config = _read_json(path / "config.json")
        architecture = _architecture(path, config)
        labels = None
        if architecture.endswith(CLASSIFIERS):
            names = config.get("id2label")
            labels = len(names) if isinstance(names, dict) else config.get("num_labels", 2)
        tokenizer_config = path / "tokenizer_config.json"
        template = (path / "chat_template.jinja").is_file() or (
            tokenizer_config.is_file() and bool(_read_json(tokenizer_config).get("chat_template"))
        )
        text = text_settings(config)
        for name in (*CONTEXT_LENGTHS, "vocab_size"):
            if not isinstance(text.get(name), int | None):
                raise UserError(
                    f"{name} in {path / 'config.json'} is {text[name]!r}, which is not a whole number. Take the "
                    "config.json of the model's authors."
                )
        context = next((text[name] for name in CONTEXT_LENGTHS if text.get(name)), None)
        quantisation = config.get("quantization_config", text.get("quantization_config"))
        method = str(quantisation.get("quant_method", "unknown")) if isinstance(quantisation, dict) else None
        found = cls(path, architecture, context, labels, template, config, method, text.get("vocab_size"))
        found.require_plain_weights()
        return found

    def require_causal(self) -> None:
        """Raise UserError unless this is a causal language model that all stages support."""
        require_supported(self.settings, str(self.path))
        if not self.architecture.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")):
            raise UserError(
                f"{self.path} is a {self.architecture}; a policy must be a causal language model (…ForCausalLM)."
            )

    def require_plain_weights(self) -> None:
        """Raise UserError if the weights are quantised, which no stage supports."""
        if self.quantised is not None:
            raise UserError(
                f"{self.path} is a quantised checkpoint (quantization_config: {self.quantised}), whose weights cannot "
                "be trained or read by every stage. Give the model that it was made from, in bfloat16 or float32; or "
                "load it in transformers, call model.dequantize() where the method has that, and save_pretrained."
            )

    @property
    def support(self) -> Support:
        """How this causal language model is computed, and its batches are packed."""
        return support_of(self.settings)

    def require_engine(self, engine: str) -> None:
        """Raise UserError if an engine cannot sample from this causal language model."""
        if engine == "transformers" and self.support == "recurrent":
            raise UserError(
                f"engine=transformers cannot sample from {self.path} ({self.architecture}): its layers carry a state "
                "from token to token, which padding changes. Set engine=vllm."
            )

    @property
    def has_tokenizer(self) -> bool:
        """Whether the directory holds a tokenizer's vocabulary."""
        return any((self.path / name).is_file() for name in ("tokenizer.json", *OTHER_VOCABULARIES))

    def require_chat_template(self) -> None:
        """Raise UserError unless there is a tokenizer with a chat template."""
        require_tokenizer(self.path)
        if not self.has_chat_template:
            raise UserError(
                f"the tokenizer of {self.path} has no chat template, so a conversation cannot be turned into tokens. "
                "Use an instruction-tuned model, or put a chat_template.jinja into the directory."
            )

    def require_classifier_start(self) -> None:
        """Raise UserError unless a classifier with one label can be trained from this model: from such a classifier, or
        from a causal language model."""
        if self.labels is None:
            self.require_causal()
        else:
            self.require_one_label()

    def require_one_label(self) -> None:
        """Raise UserError unless this is a reward model with a single output."""
        if self.labels != 1 or self.classifies_tokens:
            found = "no classifier" if self.labels is None else f"{self.labels} labels"
            found += " for each token (for which there is kind=process_reward)" if self.classifies_tokens else ""
            raise UserError(
                f"reward model {self.path} is a {self.architecture} with {found}; a Bradley-Terry reward model is a "
                "…ForSequenceClassification with exactly one (num_labels=1)."
            )

    @property
    def classifies_tokens(self) -> bool:
        """Whether this is a classifier of tokens instead of whole sequences."""
        return self.labels is not None and not self.architecture.endswith("ForSequenceClassification")

    @property
    def has_value_head(self) -> bool:
        """Whether this is a policy that is its own critic."""
        return (self.path / VALUE_HEAD).is_file()

    def require_ids(self, largest: int, what: str) -> None:
        """Raise UserError if `largest`, the largest token id in `what`, is outside the model's embedding."""
        if self.vocabulary_size is not None and largest >= self.vocabulary_size:
            raise UserError(
                f"{what} holds the token id {largest}, but the embedding of {self.path} has only "
                f"{self.vocabulary_size} rows (vocab_size in config.json): its tokenizer is of another model, or got "
                "tokens that the weights do not have. Save both of one model, or call resize_token_embeddings and "
                "train the new rows."
            )

    def require_length(self, tokens: int, what: str) -> None:
        """Raise UserError if `tokens`, the value of the config key `what`, exceed the model's context."""
        if self.context_length is not None and tokens > self.context_length:
            raise UserError(
                f"{what} is {tokens} tokens, but the context of {self.path} is {self.context_length} "
                "(max_position_embeddings). Lower it to at most that."
            )


def architecture_of(path: Path) -> str:
    """The name of a model's class, from its config.json alone.

    Raises:
        UserError: config.json does not name one.
    """
    return _architecture(path, _read_json(path / "config.json"))


def _architecture(path: Path, config: dict[str, Any]) -> str:
    """The first class that `architectures` lists."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UserError(
            f"{path / 'config.json'} does not say which class its weights are of: its `architectures` is {names!r}. "
            'Take the config.json of the model\'s authors, or set it, as in "architectures": ["LlamaForCausalLM"].'
        )
    return names[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. Download or save the model again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object. Download or save the model again.")
    return data
