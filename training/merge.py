"""Merges a PEFT adapter into its model, and publishes the result as a checkpoint like any other."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from contracts.errors import UserError
from contracts.fingerprint import ADAPTER, weights_fingerprint
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.stage import Context, Outcome
from modeling.loading import load_causal, load_reward, read_config, tensor_shapes
from training.checkpoint import save_checkpoint
from training.config import MergeConfig
from training.models import classifier_changes

WEIGHTS = "adapter_model.safetensors"
VOCABULARY_MODULES = ("embed_tokens", "wte", "embed_in", "lm_head", "embed_out")
"""Modules whose weights have one row per token of the vocabulary."""
TOLERANCE = 1e-3
"""Maximum difference of log-probabilities in float32 before and after the merge, in nats."""


@torch.no_grad()
def run(config: MergeConfig, context: Context) -> Outcome:
    """Publish the model with the adapter merged into it in float32, and stored in bfloat16 if the model is.

    The tokenizer is the adapter's if it has one. Log-probabilities of some tokens are compared before and after the
    merge, and again with the checkpoint as read back.

    Raises:
        UserError: model or adapter is damaged, they do not belong together, or the adapter cannot be merged.
    """
    logging.disable_progress_bar()
    settings, tensors = read_adapter(config.adapter)
    info = ModelInfo.read(config.model)
    is_classifier = settings.get("task_type") == "SEQ_CLS" or info.labels is not None
    model_config = read_config(config.model)
    dtype = torch.bfloat16 if getattr(model_config, "dtype", None) is torch.bfloat16 else torch.float32
    changes: dict[str, Any] = {}
    with context.timed("load"):
        if is_classifier and info.labels is None:
            if not any("score" in name for name in tensors):
                raise UserError(f"{config.adapter} is a classifier's adapter without its head `score`. Save it again.")
            model_config.num_labels = 1
            changes |= classifier_changes(config.model, model_config)
        model = _load(config.model, is_classifier)
        for key, value in _fit_vocabulary(model, tensors).items():
            changes[key] = value
            setattr(model_config, key, value)
        adapted = _attach(model, config, set(tensors))
    with context.timed("compute"):
        ids = torch.randint(model_config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
        wanted = _log_probabilities(adapted, ids)
        merged = adapted.merge_and_unload(safe_merge=True).eval()
        _require_same(wanted, _log_probabilities(merged, ids), config, "merging changed them")
    with context.timed("save"):
        auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
        has_tokenizer = (config.adapter / "tokenizer_config.json").is_file()
        facts = save_checkpoint(
            context.publication, merged.state_dict(), merged, start=config.model,
            shapes=tensor_shapes(auto, model_config), dtype=dtype, changes=changes, unit="models",
            tokenizer=config.adapter if has_tokenizer else None,
        )  # fmt: skip
        del merged, adapted, model
        directory = context.publication.directory
        read = _load(directory, is_classifier)
        _require_same(wanted, _log_probabilities(read, ids), config, "the checkpoint, read back, has others")
        ledger = Ledger("models")
        ledger.keep()
        row = {"rank": settings.get("r"), "alpha": settings.get("lora_alpha"), "tensors": len(tensors)}
        context.publication.write_rows("merge.jsonl", [row], ledger)
    return Outcome("models", {"adapter": str(settings["peft_type"]), **facts}, weights_fingerprint(directory))


def read_adapter(adapter: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Read an adapter's settings, and the shapes of its tensors by name.

    Raises:
        UserError: it is not a PEFT adapter, or is damaged.
    """
    if not (adapter / ADAPTER).is_file():
        raise UserError(f"{adapter} is not an adapter: it has no {ADAPTER}. Give the directory that PEFT wrote.")
    try:
        settings = json.loads((adapter / ADAPTER).read_bytes())
        peft_type = settings["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{adapter / ADAPTER} is damaged: {error}. Save the adapter again.") from error
    if not (adapter / WEIGHTS).is_file():
        raise UserError(
            f"{adapter} has no {WEIGHTS}; other formats can run code on loading and are not read. Load it with peft, "
            "and save it again."
        )
    try:
        with safe_open(adapter / WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            broken = [name for name in shapes if not file.get_tensor(name).isfinite().all()]
    except Exception as error:  # safetensors raises one type for everything
        raise UserError(f"{adapter / WEIGHTS} is cut off or damaged: {error}. Save the adapter again.") from error
    if broken:
        raise UserError(f"{adapter / WEIGHTS}: {broken[0]} has values that are not finite.")
    if not shapes or str(peft_type) not in ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA"):
        raise UserError(f"{adapter} is an adapter of type {peft_type}, which cannot be merged into weights.")
    return settings, shapes


def _load(model: Path, is_classifier: bool) -> Any:
    """Load a model in float32, including the remainders of bfloat16 weights if the checkpoint has them."""
    if is_classifier:
        return load_reward(model, torch.float32, 0, master=True).eval()
    return load_causal(model, torch.float32, master=True).eval()


def _fit_vocabulary(model: Any, tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Resize the vocabulary to that of the adapter, and untie the LM head if the adapter changes it or the embedding.

    Returns the resulting changes to config.json.
    """
    touched = [name for name in tensors if any(f".{part}." in name for part in VOCABULARY_MODULES)]
    changes: dict[str, Any] = {}
    words = {tensors[name][0] for name in touched if name.endswith(".weight") and "lora_" not in name}
    if len(words) == 1 and words != {model.get_input_embeddings().weight.shape[0]}:
        changes["vocab_size"] = words.pop()
        model.resize_token_embeddings(changes["vocab_size"], mean_resizing=False)
    head = model.get_output_embeddings()
    if touched and head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = changes["tie_word_embeddings"] = False
        model.all_tied_weights_keys = {}
    return changes


def _attach(model: Any, config: MergeConfig, names: set[str]) -> Any:
    """Attach the adapter to the model, and check that every tensor of it was used."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, str(config.adapter), torch_device="cpu").eval()
            placed = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()
        raise UserError(
            f"the adapter {config.adapter} cannot be put on {config.model}: {' '.join(first[:2])}. Give the model that "
            "it was trained on."
        ) from error
    words = {name for name in names if any(f".{part}." in name for part in VOCABULARY_MODULES) and "lora_" not in name}
    if lost := sorted(placed - names) or sorted(names - placed - words):
        raise UserError(
            f"the adapter {config.adapter} does not belong to {config.model}: {lost[0]} and {len(lost) - 1} other "
            "tensors have no counterpart. Give the model that it was trained on."
        )
    return adapted


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of all tokens after each of `ids`; for a classifier its scores."""
    logits: Tensor = model(input_ids=ids[:1]).logits if model.config.pad_token_id is None else model(ids).logits
    return logits if logits.dim() == 2 else logits.log_softmax(-1)


def _require_same(wanted: Tensor, found: Tensor, config: MergeConfig, what: str) -> None:
    worst = float((wanted - found).abs().max())
    if not worst <= TOLERANCE:
        raise RuntimeError(
            f"{config.model} with {config.adapter}: log-probabilities differ by {worst:.3g}, because {what}"
        )
