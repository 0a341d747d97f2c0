"""Computes how a parallel layout divides a model's tensors over ranks, from names, shapes and config.json alone.

The ranks of a layout are a mesh [pp, dp, tp], tp fastest, as torch and vLLM number them. A tensor is divided in steps:

    pp  A pipeline stage has some layers; the first also has the embedding, the last the final norm and the head. For a
        tied head, the last stage has a second copy of the embedding.
    tp  Query, key, value, gate and up projections are cut by rows (outputs), output and down projections by columns
        (inputs), embedding and head by rows of the vocabulary, or not at all (Shoeybi et al. 2019, arXiv 1909.08053).
        With fewer key-value heads than ranks, several ranks have the same head.
    dp  Every replica has all of that, or a shard of each tensor: rows as in `torch.chunk` (FSDP2), or an equal part of
        the flattened tensor (ZeRO-3, Rajbhandari et al. 2020, arXiv 1910.02054; without its padding).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from contracts.architectures import text_settings
from contracts.errors import UserError, did_you_mean

OUTPUT_SPLIT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
"""Projections of a layer whose outputs are divided over tensor parallel ranks: dimension 0 of weight and bias."""
INPUT_SPLIT = ("self_attn.o_proj", "mlp.down_proj")
"""Projections whose inputs are divided: dimension 1 of the weight; the bias is whole."""
NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    "self_attn.q_norm", "self_attn.k_norm",
)  # fmt: skip
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Gemma", "Gemma2", "Gemma3", "Gemma3Text")
"""Supported architectures: the class names without their suffix in `HEADS`."""
HEADS = ("ForCausalLM", "ForSequenceClassification")
VOCABULARY_MULTIPLE = 64
"""A vocabulary is padded to a multiple of this before it is divided, as in vLLM."""
MAX_RANKS = 65_536
"""The most ranks of a layout: more than any training has had, and few enough to plan in memory."""
LAYER_MODULES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj", "input_layernorm", "post_attention_layernorm",
)  # fmt: skip
"""Modules that every layer of these architectures has."""
IN_LAYER = re.compile(r"(?:base_model\.model\.)?(?:model\.){0,2}layers\.(\d+)\.(.+)")
OUTSIDE = re.compile(r"(?:base_model\.model\.)?(?:model\.){0,2}(embed_tokens|norm|lm_head|score|value_head)\.(.+)")
ADAPTER_SUFFIX = re.compile(r"\b(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?$")
REMAINDER = "master/"
"""The prefix of names of remainders to fp32 (`contracts.models.MASTER`), which are divided like their tensors."""

Sharding = Literal["none", "rows", "flat"]
Vocabulary = Literal["divided", "whole"]


@dataclass(frozen=True)
class RankLayout:
    """A parallel layout of dp · tp · pp ranks."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    sharding: Sharding = "none"
    """The sharding of each tensor over the dp ranks."""
    vocabulary: Vocabulary = "divided"
    """Whether tp divides embedding and head (vLLM, Megatron), or every rank has them whole (Ratchet's trainer)."""
    layers: tuple[int, ...] = ()
    """The number of layers of each pipeline stage; by default as equal as possible."""

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.dp * self.tp * self.pp

    def rank(self, stage: int, replica: int, part: int) -> int:
        """The rank at a position of the mesh [pp, dp, tp]."""
        return (stage * self.dp + replica) * self.tp + part

    @classmethod
    def parse(cls, text: str) -> "RankLayout":
        """Parse a layout like `tp=4,pp=2`. The keys are dp, tp, pp, shard (none, rows, flat), vocab (divided, whole)
        and layers (of each stage, like 9+7).

        Raises:
            UserError: the text is no valid layout.
        """
        fields: dict[str, Any] = {}
        names = {"dp": "dp", "tp": "tp", "pp": "pp", "shard": "sharding", "vocab": "vocabulary", "layers": "layers"}
        items = [item for part in text.split(",") if (item := part.strip())]
        if not items:
            raise UserError(f"layout {text!r} is empty. Write it like tp=4,pp=2; tp=1 is the whole checkpoint.")
        for item in items:
            key, _, value = item.partition("=")
            if key not in names:
                raise UserError(
                    f"layout {text!r}: {key!r} is not a key.{did_you_mean(key, names)} Write it like tp=4,pp=2; the "
                    f"keys are {', '.join(names)}."
                )
            if names[key] in fields:
                raise UserError(f"layout {text!r}: {key!r} occurs twice. Give it once.")
            choices = {"shard": get_args(Sharding), "vocab": get_args(Vocabulary)}.get(key)
            if choices is not None:
                if value not in choices:
                    raise UserError(f"layout {text!r}: {key}={value!r} is not one of {', '.join(choices)}.")
                fields[names[key]] = value
                continue
            numbers = value.split("+") if key == "layers" else [value]
            if not all(number.isdecimal() and int(number) > 0 for number in numbers):
                example = "positive numbers like 9+7" if key == "layers" else "a positive number"
                raise UserError(f"layout {text!r}: {key}={value!r} is not {example}.")
            fields[names[key]] = tuple(map(int, numbers)) if key == "layers" else int(value)
        layout = cls(**fields)
        if layout.ranks > MAX_RANKS:
            raise UserError(
                f"layout {text!r} has {layout.ranks:,} ranks, but at most {MAX_RANKS:,} are supported. Lower dp, "
                "tp or pp."
            )
        if layout.layers and len(layout.layers) != layout.pp:
            raise UserError(
                f"layout {text!r}: layers has {len(layout.layers)} numbers, but pp={layout.pp}. Give one per stage."
            )
        return layout

    def __str__(self) -> str:
        """The text that `parse` reads, without keys that have their default."""
        parts = [f"{name}={getattr(self, name)}" for name in ("dp", "tp", "pp") if getattr(self, name) > 1]
        parts += [f"shard={self.sharding}"] if self.sharding != "none" else []
        parts += [f"vocab={self.vocabulary}"] if self.vocabulary != "divided" else []
        parts += [f"layers={'+'.join(map(str, self.layers))}"] if self.layers else []
        return ",".join(parts) or "tp=1"


@dataclass(frozen=True)
class GlobalTensor:
    """An undivided tensor of a model."""

    name: str
    dtype: str
    """The dtype as safetensors names it: F32, BF16, ..."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class LocalPart:
    """The part of a tensor that one rank has: of the tensor as rows of `width` elements, take columns `first` to
    `last`, and of these, in row-major order, elements `start` to `end`. A tensor that is not cut by columns is one
    row."""

    shape: tuple[int, ...]
    """The shape of the rank's contiguous local tensor."""
    width: int
    first: int
    last: int
    start: int
    end: int

    @property
    def elements(self) -> int:
        """The number of elements."""
        return self.end - self.start

    @property
    def cut_by_columns(self) -> bool:
        """Whether the part has only some columns of its rows."""
        return (self.first, self.last) != (0, self.width)


def layer_bounds(layers: int, stages: int) -> list[int]:
    """The boundaries [stages + 1] of pipeline stages of nearly equal size: stage i begins at layer bounds[i]."""
    return [round(stage * layers / stages) for stage in range(stages + 1)]


def flat_part(tensor: GlobalTensor, start: int, end: int, shape: tuple[int, ...] | None = None) -> LocalPart:
    """The part that consists of elements `start` to `end` of the flattened tensor."""
    width = max(tensor.elements, 1)
    return LocalPart((end - start,) if shape is None else shape, width, 0, width, start, end)


def part_of(
    tensor: GlobalTensor,
    cut: tuple[int, int, int] | None = None,
    *,
    sharding: Sharding = "none",
    shards: int = 1,
    shard: int = 0,
) -> LocalPart:
    """The part of a tensor that a rank has.

    Args:
        cut: (dimension, start, end): the range that the rank has of a dimension; None: everything.
        sharding: how the result of `cut` is divided over `shards` ranks, of which this is number `shard`.
    """
    shape = list(tensor.shape)
    dim, low, high = cut if cut is not None else (0, 0, shape[0] if shape else 1)
    if shape:
        shape[dim] = high - low
    inner = math.prod(tensor.shape[dim + 1 :])
    elements = math.prod(shape)
    start, end = 0, elements
    if sharding == "flat":
        length = -(-elements // shards)
        start, end = min(shard * length, elements), min((shard + 1) * length, elements)
        shape = [end - start]
    elif sharding == "rows":
        count = shape[0] if shape else 1
        length = -(-count // shards)
        begin, behind = min(shard * length, count), min((shard + 1) * length, count)
        row = elements // count if count else 0
        start, end = begin * row, behind * row
        shape = [behind - begin, *shape[1:]]
    if dim == 0:
        return flat_part(tensor, low * inner + start, low * inner + end, tuple(shape))
    width = tensor.shape[dim] * inner
    return LocalPart(tuple(shape), width, low * inner, high * inner, start, end)


@dataclass
class Division:
    """The division of a model's tensors over the ranks of a layout.

    Raises:
        UserError: the architecture or a tensor is not supported, or not divisible by the layout; the message names the
            number that does not fit. A layout without tp and pp supports every model.
    """

    layout: RankLayout
    config: Mapping[str, Any]
    """The content of the model's config.json."""
    tensors: Mapping[str, GlobalTensor]
    name: str = "the model"
    """The model's name in messages."""
    _parts: dict[str, dict[int, LocalPart]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        layout = self.layout
        self._text = text_settings(self.config)
        self._bounds: list[int] = [0, 0]
        self._require_shards()
        if layout.tp > 1 or layout.pp > 1:
            self._require_known()
            layers = self._number("num_hidden_layers")
            self._bounds = layer_bounds(layers, layout.pp)
            if layout.layers:
                self._bounds = [sum(layout.layers[:stage]) for stage in range(layout.pp + 1)]
            if self._bounds[-1] != layers or layout.pp > layers:
                raise UserError(
                    f"layout {layout}: {self.name} has {layers} layers, which do not fit these pipeline stages. Set "
                    f"pp to at most {layers}, and layers to numbers that add up to it."
                )
        for tensor in self.tensors.values():
            self._parts[tensor.name] = dict(self._divide(tensor))

    def parts(self, name: str) -> dict[int, LocalPart]:
        """The parts of a tensor by rank; some may be empty."""
        return self._parts[name]

    def parts_of_rank(self, rank: int) -> dict[str, LocalPart]:
        """A rank's parts by tensor name."""
        return {name: parts[rank] for name, parts in self._parts.items() if rank in parts}

    def _require_shards(self) -> None:
        """Raise UserError if some shards would be empty for every tensor."""
        sharding = self.layout.sharding
        if sharding == "none" or not self.tensors:
            return
        most = max(
            tensor.elements if sharding == "flat" else max(tensor.shape, default=1) for tensor in self.tensors.values()
        )
        if self.layout.dp > most:
            what = "numbers" if sharding == "flat" else "rows"
            raise UserError(
                f"layout {self.layout}: no tensor of {self.name} has more than {most} {what}, so some of the "
                f"{self.layout.dp:,} shards would be empty. Set dp to at most {most}."
            )

    def _require_known(self) -> None:
        architecture = str((self.config.get("architectures") or ["unknown"])[0])
        if architecture not in {family + head for family in FAMILIES for head in HEADS}:
            raise UserError(
                f"{self.name} is a {architecture}; tensor and pipeline parallelism support only "
                f"{', '.join(FAMILIES)} models. Set tp and pp to 1; shard=rows or shard=flat divide any model."
            )

    def _number(self, key: str) -> int:
        value = self._text.get(key)
        if not isinstance(value, int):
            raise UserError(f"the config.json of {self.name} has {key} {value!r}, which is not an integer.")
        return value

    def _divide(self, tensor: GlobalTensor) -> Iterator[tuple[int, LocalPart]]:
        layout = self.layout
        stages: tuple[int, ...] = (0,)
        cuts: list[tuple[int, int, int] | None] = [None]
        if layout.tp > 1 or layout.pp > 1:
            stages, cuts = self._by_name(tensor)
        for stage in stages:
            for part, cut in enumerate(cuts):
                for replica in range(layout.dp):
                    yield (
                        layout.rank(stage, replica, part),
                        part_of(tensor, cut, sharding=layout.sharding, shards=layout.dp, shard=replica),
                    )

    def _by_name(self, tensor: GlobalTensor) -> tuple[tuple[int, ...], list[tuple[int, int, int] | None]]:
        """The pipeline stages that have a tensor, and the cut of each tensor parallel rank."""
        name = tensor.name.removeprefix(REMAINDER).replace(".base_layer.", ".")
        whole: list[tuple[int, int, int] | None] = [None] * self.layout.tp
        if match := IN_LAYER.fullmatch(name):
            layer = int(match[1])
            if layer >= self._bounds[-1]:
                raise UserError(
                    f"{self.name} holds {tensor.name}, but has {self._bounds[-1]} layers according to its config.json."
                )
            stage = next(number for number, end in enumerate(self._bounds[1:]) if layer < end)
            return (stage,), self._cuts_in_layer(tensor, match[2])
        if match := OUTSIDE.fullmatch(name):
            module, kind = match[1], ADAPTER_SUFFIX.sub(lambda suffix: suffix[1], match[2])
            last = self.layout.pp - 1
            stages: tuple[int, ...] = (0,) if module == "embed_tokens" else (last,)
            if module == "embed_tokens" and kind == "weight" and self._is_second_head(tensor.name):
                stages = tuple(dict.fromkeys((0, last)))
            divides_vocabulary = kind in ("weight", "bias", "lora_B") if module == "lm_head" else kind == "weight"
            if module in ("embed_tokens", "lm_head") and divides_vocabulary and self.layout.vocabulary == "divided":
                return stages, list(self._vocabulary_cuts(tensor))
            if kind in ("weight", "bias", "lora_A", "lora_B"):
                return stages, whole
        raise UserError(
            f"{self.name} holds {tensor.name}, which tensor and pipeline parallelism do not support. Set tp and pp to "
            "1; shard=rows or shard=flat divide any model."
        )

    def _is_second_head(self, name: str) -> bool:
        """Whether the embedding is the LM head as well."""
        prefix = REMAINDER if name.startswith(REMAINDER) else ""
        causal = str((self.config.get("architectures") or [""])[0]).endswith("ForCausalLM")
        default = str(self._text.get("model_type", "")).startswith("gemma")
        tied = self.config.get("tie_word_embeddings", self._text.get("tie_word_embeddings"))
        stored = any(f"{prefix}{each}lm_head.weight" in self.tensors for each in ("", "model."))
        return causal and bool(default if tied is None else tied) and not stored

    def _vocabulary_cuts(self, tensor: GlobalTensor) -> Iterator[tuple[int, int, int]]:
        vocabulary = tensor.shape[0]
        filled = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        length = -(-filled // self.layout.tp)
        for part in range(self.layout.tp):
            yield 0, min(part * length, vocabulary), min((part + 1) * length, vocabulary)

    def _cuts_in_layer(self, tensor: GlobalTensor, suffix: str) -> list[tuple[int, int, int] | None]:
        kind = ADAPTER_SUFFIX.sub(lambda match: match[1], suffix)
        module, _, kind = kind.rpartition(".")
        dim: int | None
        if module in OUTPUT_SPLIT and kind in ("weight", "bias", "lora_A", "lora_B", "lora_magnitude_vector"):
            dim = None if kind == "lora_A" else 0
        elif module in INPUT_SPLIT and kind in ("weight", "bias", "lora_A", "lora_B", "lora_magnitude_vector"):
            dim = 1 if kind in ("weight", "lora_A") else None
        elif module in NORMS and kind == "weight":
            dim = None
        else:
            raise UserError(
                f"{self.name} holds {tensor.name}, which tensor parallelism does not support. Set tp and pp to 1; "
                "shard=rows or shard=flat divide any model."
            )
        if dim is None:
            return [None] * self.layout.tp
        return [(dim, *self._range(tensor, module, dim, part)) for part in range(self.layout.tp)]

    def _range(self, tensor: GlobalTensor, module: str, dim: int, part: int) -> tuple[int, int]:
        """The range of dimension `dim` that a tensor parallel rank has: whole heads, or an equal part."""
        tp, size = self.layout.tp, tensor.shape[dim]
        if module.startswith("mlp."):
            key, units, shared = "intermediate_size", size, False
        elif module in ("self_attn.q_proj", "self_attn.o_proj"):
            key, units, shared = "num_attention_heads", self._number("num_attention_heads"), False
        else:
            heads = self._text.get("num_key_value_heads")
            key, shared = "num_key_value_heads", True
            units = self._number(key) if heads is not None else self._number("num_attention_heads")
        if size % units:
            raise UserError(
                f"{tensor.name} of {self.name} has shape {list(tensor.shape)}, which its {key} ({units}) do not "
                "divide. config.json and weights belong to different models."
            )
        length = size // units
        if units % tp == 0:
            return part * units // tp * length, (part + 1) * units // tp * length
        if shared and tp % units == 0:
            head = part * units // tp
            return head * length, (head + 1) * length
        raise UserError(
            f"layout {self.layout}: tp={tp} does not divide {key} ({units}) of {self.name}. Set it to a divisor"
            f"{', or a multiple of it that divides the attention heads' if shared else ''}."
        )


def require_complete(config: Mapping[str, Any], tensors: Mapping[str, GlobalTensor], name: str) -> None:
    """Check that a model of a supported architecture has all tensors that its config.json implies, in their shapes.

    Adapters, quantised weights, remainders to fp32 and other architectures are not checked.

    Args:
        name: the model's name in messages.

    Raises:
        UserError: a tensor is missing or has the wrong shape.
    """
    architecture = str((config.get("architectures") or [""])[0])
    known = {family + head for family in FAMILIES for head in HEADS}
    if architecture not in known or "quantization_config" in config or any(map(ADAPTER_SUFFIX.search, tensors)):
        return
    text = text_settings(config)
    layers = text.get("num_hidden_layers")
    if not isinstance(layers, int):
        return
    outside: dict[str, GlobalTensor] = {}
    inside: dict[int, dict[str, GlobalTensor]] = {layer: {} for layer in range(layers)}
    prefix = "model."
    for tensor in tensors.values():
        if match := IN_LAYER.fullmatch(tensor.name):
            inside.setdefault(int(match[1]), {})[match[2].replace(".base_layer.", ".")] = tensor
            prefix = tensor.name[: match.start(1)].removesuffix("layers.")
        elif match := OUTSIDE.fullmatch(tensor.name):
            outside[f"{match[1]}.{match[2]}"] = tensor
    if (beyond := max(inside, default=0)) >= layers:
        raise UserError(
            f"{name} holds tensors of layer {beyond}, but has {layers} layers according to its config.json."
        )
    of_layer = {f"{module}.weight" for module in LAYER_MODULES}.union(*inside.values())
    missing = [f"{prefix}layers.{n}.{kind}" for n, held in inside.items() for kind in sorted(of_layer - held.keys())]
    needed = {"embed_tokens.weight": prefix, "norm.weight": prefix}
    if architecture.endswith("ForSequenceClassification"):
        needed["score.weight"] = ""
    elif config.get("tie_word_embeddings", text.get("tie_word_embeddings")) is False:
        needed["lm_head.weight"] = ""
    missing += [start + kind for kind, start in needed.items() if kind not in outside]
    if missing:
        raise UserError(
            f"{name} lacks {missing[0]}{f' and {len(missing) - 1} more tensors' if missing[1:] else ''}, which a "
            f"{architecture} of {layers} layers has. Save or download the model again."
        )
    for held in (outside, *inside.values()):
        for kind, tensor in held.items():
            wanted = _expected_shape(text, kind)
            if wanted is not None and tensor.shape != wanted:
                raise UserError(
                    f"{tensor.name} of {name} has shape {list(tensor.shape)}, but config.json implies "
                    f"{list(wanted)}. config.json and weights belong to different models: save or download it again."
                )


def _expected_shape(text: Mapping[str, Any], kind: str) -> tuple[int, ...] | None:
    """The shape of a tensor according to config.json; None if it is not determined by it."""

    def number(key: str) -> int:
        value = text.get(key)
        return value if isinstance(value, int) else 0

    hidden, heads, inner, vocabulary = map(
        number, ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    )
    width = number("head_dim") or (hidden // heads if heads else 0)
    keys = number("num_key_value_heads") or heads
    module, _, sort = kind.rpartition(".")
    shapes = {
        "self_attn.q_proj": (heads * width, hidden), "self_attn.k_proj": (keys * width, hidden),
        "self_attn.v_proj": (keys * width, hidden), "self_attn.o_proj": (hidden, heads * width),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden), "norm": (hidden,),
        **{each: (width,) if each.startswith("self_attn.") else (hidden,) for each in NORMS},
    }  # fmt: skip
    shape = shapes.get(module) if sort in ("weight", "bias") else None
    if shape is not None and sort == "bias":
        shape = shape[:1]
    return shape if shape and all(shape) else None
