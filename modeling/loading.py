"""Loads models for all stages, and never leaves a weight at its random initialization."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen2ForTokenClassification,
)
from transformers.integrations import accelerate as accelerate_integration

from contracts.architectures import support_of
from contracts.errors import UserError
from contracts.models import CLASSIFIERS, PROCESS_MODEL, VALUE_HEAD, ModelInfo
from contracts.seeds import derive_seed
from contracts.weights import stored_tensors
from modeling.finite import is_equal, require_finite
from modeling.master import MasterWeights
from modeling.modes import gathered, is_partitioned
from modeling.probe import check_architecture, require_independence
from modeling.rope import fix_rope

Shapes = dict[str, tuple[int, ...]]
LoadedAs = Literal["causal", "classifier", "token classifier"]
"""The kinds of transformers classes that a model can be loaded as."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""torch's dtypes by safetensors' names."""
NEW_HEAD = "score.weight"
"""The score head, which a reward model or critic initialized from a causal language model lacks."""
LEFTOVER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)$")
"""Buffers that older versions of transformers saved; models now compute them."""
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.(weight|bias)$")
"""A causal language model's head, which a classifier does not use."""


def read_config(model: Path) -> Any:
    """The transformers configuration of a model directory.

    Raises:
        UserError: transformers cannot read it, or needs remote code to do so.
    """
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # depending on the config, it can raise anything
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{model} needs its own Python code (auto_map in its config.json), which is never run. Choose a model "
                "whose architecture is part of transformers."
            ) from error
        raise UserError(
            f"transformers cannot read the configuration of {model}: {_in_one_line(error)}. Check its config.json."
        ) from error


def vocabulary_size(config: Any) -> int:
    """The number of rows of the token embedding."""
    return int(config.get_text_config().vocab_size)


def tensor_shapes(auto: Any, config: Any) -> Shapes:
    """The shape of every tensor of the architecture by name, without allocating weights.

    Call it before an `Accelerator` exists: under ZeRO-3 every later construction partitions its parameters.
    """
    return {name: tuple(tensor.shape) for name, tensor in empty_model(auto, config).state_dict().items()}


def empty_model(auto: Any, config: Any) -> Any:
    """Build the model of a configuration on the meta device.

    Raises:
        UserError: transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            return auto.from_config(copy.deepcopy(config))
    except Exception as error:  # depending on the config, it can raise anything
        raise UserError(
            f"transformers cannot build the model that config.json describes ({config.model_type}): "
            f"{_in_one_line(error)}. Check it, or choose a model of another architecture."
        ) from error


def _in_one_line(error: Exception) -> str:
    """A library's error message without the paragraphs of advice that may follow."""
    first = str(error).strip().partition("\n\n")[0]
    return " ".join(first.split()).rstrip(".") or type(error).__name__


class Qwen2ForProcessRewardModel(Qwen2ForTokenClassification):
    """Qwen2.5-Math-PRM (Zhang et al. 2025, arXiv 2501.07301): two labels per token, from a head of two layers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.post_init()

    @classmethod
    def from_config(cls, config: Any) -> "Qwen2ForProcessRewardModel":
        """Build a model, like `from_config` of transformers' auto classes."""
        return cls(config)


def check_weights(model: Path, load_as: LoadedAs) -> None:
    """Check that a model directory has exactly the weights of the class it will be loaded as, all of them finite.

    If a causal language model is loaded as a classifier with one label, only the classifier's head may be missing. The
    model is not allocated. Call it before an `Accelerator` exists.

    Raises:
        UserError: weights are missing, unexpected or not finite (the message names them), or the architecture is not
            supported.
    """
    info = ModelInfo.read(model)
    config = read_config(model)
    if load_as == "causal":
        info.require_causal()
        _compare(AutoModelForCausalLM, model, config, new_head=False)
        check_architecture(model, config)
    elif load_as == "token classifier":
        _compare(_token_class(info), model, config, new_head=False)
    else:
        config.num_labels = 1
        _compare(AutoModelForSequenceClassification, model, config, new_head=info.labels is None)
    require_finite(model)


def _compare(auto: Any, model: Path, config: Any, *, new_head: bool, dtype: torch.dtype = torch.float32) -> Any:
    """Compare a checkpoint's headers with its architecture by transformers' own loader. Returns the model on the meta
    device.

    The loader gets meta tensors, so that it renames, merges and ties them like the real ones, and reports missing,
    unexpected and mismatched keys.
    """
    empty = empty_model(auto, config)
    model_class = type(empty)
    _require_one_head(model, getattr(empty, "all_tied_weights_keys", None) or {})
    tensors = {
        name: torch.empty(tensor.shape, dtype=DTYPES.get(tensor.dtype, torch.uint8), device="meta")
        for name, tensor in stored_tensors(model).items()
    }
    # transformers requires accelerate for any device_map, but needs it only to spread a model over several devices.
    with mock.patch.object(accelerate_integration, "is_accelerate_available", return_value=True):
        loaded, report = _from_pretrained(
            model_class, model, None, config=config, state_dict=tensors, device_map="meta", dtype=dtype
        )
    _require_complete(report, model, model_class.__name__, new_head)
    return loaded


def _require_one_head(model: Path, tied: Mapping[str, str]) -> None:
    """Raise UserError if weights that config.json ties differ in the files: vLLM would load one of them, transformers
    both."""
    stored = stored_tensors(model)
    for second, first in tied.items():
        one, other = stored.get(first), stored.get(second)
        if one is not None and other is not None and not is_equal(one, other):
            raise UserError(
                f"{model} holds {first} and {second}, which are tied according to config.json (tie_word_embeddings), "
                "but differ: engines and training would use different ones. Set tie_word_embeddings to false in it."
            )


def load_value_head(model: Path, hidden_size: int) -> torch.Tensor:
    """The value head of a policy that is its own critic, [1, hidden size]; zeros if it has none yet."""
    if not (model / VALUE_HEAD).is_file():
        return torch.zeros(1, hidden_size)
    return load_file(model / VALUE_HEAD)["weight"]


def load_causal(model: Path, dtype: torch.dtype, *, master: bool = False, empty: bool = False, **options: Any) -> Any:
    """Load a causal language model.

    Args:
        model: its directory.
        dtype: number format of the weights.
        master: in float32, restore the master weights of the last training instead of the bfloat16 weights.
        empty: leave the parameters on the meta device; buffers are computed and the checkpoint is checked as usual.
        options: options of transformers' loader.
    """
    if empty:
        return _empty(AutoModelForCausalLM, model, dtype)
    return _measured(_load(AutoModelForCausalLM, model, dtype, master=master, **options), model)


def load_classifier(model: Path, dtype: torch.dtype) -> Any:
    """Load a sequence classifier, head included."""
    return _load(AutoModelForSequenceClassification, model, dtype)


def load_token_classifier(model: Path, dtype: torch.dtype) -> Any:
    """Load a token classifier whose head is called `score`.

    Raises:
        UserError: its head has another name.
    """
    loaded = _load(_token_class(ModelInfo.read(model)), model, dtype)
    if not hasattr(loaded, "score"):
        raise UserError(f"{type(loaded).__name__} has no head called `score`. Choose another model.")
    return loaded


def _token_class(info: ModelInfo) -> Any:
    return Qwen2ForProcessRewardModel if info.architecture == PROCESS_MODEL else AutoModelForTokenClassification


def load_reward(model: Path, dtype: torch.dtype, seed: int, *, master: bool = False, empty: bool = False) -> Any:
    """Load a sequence classifier with one label. A causal model gets a new head, initialized from `seed`.

    The new head is normal with standard deviation 1 / sqrt(hidden size + 1) (Stiennon et al. 2020, arXiv 2009.01325).
    `dtype`, `master` and `empty` are those of `load_causal`.
    """
    has_head = ModelInfo.read(model).labels is not None
    auto = AutoModelForSequenceClassification
    if empty:
        loaded = _empty(auto, model, dtype, new_head=not has_head, num_labels=1)
    else:
        loaded = _load(auto, model, dtype, new_head=not has_head, master=master, num_labels=1)
    if not hasattr(loaded, "score"):
        raise UserError(f"{type(loaded).__name__} has no linear head called `score`. Choose another model.")
    if not has_head:
        if empty:
            loaded.score.weight = nn.Parameter(torch.empty(loaded.score.weight.shape, dtype=dtype))
        weight = loaded.score.weight
        with gathered([weight], modifier=0), torch.no_grad():
            generator = torch.Generator().manual_seed(derive_seed("reward head", seed))
            fresh = torch.randn(weight.shape, generator=generator) / (weight.shape[-1] + 1) ** 0.5
            weight.copy_(fresh.to(weight))
    return loaded if empty else _measured(loaded, model)


def _empty(auto: Any, model: Path, dtype: torch.dtype, *, new_head: bool = False, **options: Any) -> Any:
    """Build a checkpoint's model with its parameters on the meta device and its buffers computed.

    Raises:
        UserError: weights are missing, unexpected or not finite.
        ValueError: modules other than rotary embeddings have buffers, which only transformers' loader can compute.
    """
    ModelInfo.read(model)
    require_finite(model)
    config = read_config(model)
    for name, value in options.items():
        setattr(config, name, value)
    loaded = _compare(auto, model, config, new_head=new_head, dtype=dtype)
    for owner in list(loaded.modules()):
        for name, module in list(owner.named_children()):
            if any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
                if not hasattr(module, "rope_type"):
                    raise ValueError(f"{type(module).__name__} of {model} has buffers that are not known")
                setattr(owner, name, type(module)(config.get_text_config()))
    make_independent(loaded)
    return loaded


def _load(
    auto: Any, model: Path, dtype: torch.dtype, *, new_head: bool = False, master: bool = False, **options: Any
) -> Any:
    """Load a model with every tensor from the checkpoint; with `new_head`, every tensor but the classifier's head.

    Raises:
        UserError: transformers cannot load it, weights are missing, unexpected or not finite.
    """
    ModelInfo.read(model)
    require_finite(model)
    start = MasterWeights(model) if master and dtype == torch.float32 else None
    if start is not None and start.has_remainders:
        config = read_config(model)
        for name, value in options.items():
            setattr(config, name, value)
        loaded, report = _from_pretrained(
            type(empty_model(auto, config)), model, None, config=config, state_dict=dict(start.items()), dtype=dtype
        )
    else:
        loaded, report = _from_pretrained(
            auto,
            model,
            model,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    _require_complete(report, model, type(loaded).__name__, new_head)
    make_independent(loaded)
    return loaded


def _from_pretrained(loader: Any, model: Path, source: Path | None, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Call transformers' loader and return its loading report as well; its errors become UserErrors."""
    if source is not None:
        read_config(source)  # for its better messages about a broken config
    try:
        loaded, report = loader.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise UserError(f"transformers cannot load {model}: {error}. Check that its files are complete.") from error
    return loaded, report


def _require_complete(report: Mapping[str, Any], model: Path, class_name: str, new_head: bool) -> None:
    """Raise UserError unless exactly the architecture's tensors were loaded, each with its shape."""
    missing = sorted(name for name in report["missing_keys"] if not (new_head and name == NEW_HEAD))
    if missing:
        raise UserError(
            f"{model} lacks {_named(missing)}, which {class_name} needs and which would stay random. Download or save "
            "the whole model again."
        )
    wrong = sorted((name, tuple(found), tuple(wanted)) for name, found, wanted in report["mismatched_keys"])
    wrong = [entry for entry in wrong if not (new_head and entry[0] == NEW_HEAD)]
    if wrong:
        name, found, wanted = wrong[0]
        raise UserError(
            f"{model} holds {_named([name for name, _, _ in wrong])} with another shape than config.json implies: "
            f"{name} is {list(found)}, {class_name} needs {list(wanted)}. config.json and weights belong to different "
            "models: download or save both again."
        )
    harmless = [LEFTOVER, HEAD] if class_name.endswith(CLASSIFIERS) else [LEFTOVER]
    unread = sorted(name for name in report["unexpected_keys"] if not any(each.search(name) for each in harmless))
    if unread:
        raise UserError(
            f"{model} holds {_named(unread)}, which {class_name} does not have, so the loaded model would differ from "
            "the saved one. Check architectures and the number of layers in config.json, or save the model again with "
            "the class that loads it."
        )


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def make_independent(model: Any) -> None:
    """Make a loaded model's outputs independent of the batch and switch off auxiliary losses, in place."""
    fix_rope(model)
    text = model.config.get_text_config()
    if hasattr(text, "output_router_logits"):
        text.output_router_logits = False  # otherwise the experts' auxiliary loss is computed as well
    if getattr(text, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # sdpa ignores the cap in transformers 5.19


def _measured(loaded: Any, model: Path) -> Any:
    """Return the loaded model, after a test of batch independence if its architecture is unknown."""
    if support_of(loaded.config.to_dict()) == "measured" and not any(map(is_partitioned, loaded.parameters())):
        require_independence(loaded.eval(), str(model))
    return loaded
