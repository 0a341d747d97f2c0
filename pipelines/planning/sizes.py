"""How large models and data are, before they are made: from configs and from the headers of files. No torch.

What cannot be known yet (a data set on the Hub), or cannot be read, is None; what is wrong with it is for others to
say.
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from annotation.config import PairsConfig
from contracts.errors import UserError
from contracts.fingerprint import MODEL_FILES
from contracts.manifest import MANIFEST
from contracts.prompts import PromptsConfig
from contracts.splits import choose_files
from embedded.config import WorldConfig
from embedded.reviews import vocabulary
from generation.config import GenerationConfig
from pipelines.graph import Graph
from pipelines.planning.hub import name_and_revision
from training.config import (
    ExperienceConfig,
)

TEMPLATE_TOKENS = 64
"""Tokens that a chat template adds to a prompt, generously."""
PROMPT = 160
"""Bytes that a published prompt has beside its text."""
WORLD_ROW = 200
"""Bytes of a row of the embedded world's data."""
UNSEEN = 2048
"""Bytes of a prompt that nobody has seen yet."""
LINES = (".jsonl", ".json", ".csv", ".tsv")
"""Files with a row a line; a `.json` may also be one list of many."""
COMPRESSED = (4, 200)
"""A Parquet or Arrow file stands for so many times its size as JSONL, in rows of so many bytes."""


@dataclass(frozen=True)
class Size:
    """A model's measures."""

    parameters: int
    """P: a tied LM head, which is the embedding, counts once."""
    hidden: int
    layers: int
    intermediate: int
    """Width of the feed-forward layers that one token passes."""
    query_width: int
    """Attention heads times their width."""
    key_width: int
    """Key-value heads times the width of a head."""
    vocabulary: int
    tied: bool
    context: int | None = None
    other_files: int = 64 << 10
    """Bytes of configuration and tokenizer."""
    tensors: dict[str, int] = field(default_factory=dict)
    """Numbers in each tensor by name; empty where there are no weights to look at."""
    model_type: str = "llama"
    """The architecture, as config.json names it."""
    classifier: bool = False
    """Whether it gives one score per sequence instead of having an LM head."""

    def trained(self, frozen: list[str]) -> int:
        """T: the parameters whose names contain none of `frozen`; all where the names are not known."""
        tensors = {name: count for name, count in self.tensors.items() if not (self.tied and _is_head(name))}
        return self.parameters - sum(count for name, count in tensors.items() if any(part in name for part in frozen))

    @property
    def cache_numbers(self) -> int:
        """Numbers in the KV cache for each token: 2 · layers · key-value heads · width of a head."""
        return 2 * self.layers * self.key_width

    def checkpoint_bytes(self, number: int) -> int:
        """Bytes of a published checkpoint with numbers of so many bytes: weights, their index, tokenizer."""
        return number * self.parameters + 128 * len(self.tensors) + self.other_files

    def as_classifier(self) -> "Size":
        """The same with one score per sequence instead of an LM head."""
        if self.classifier:
            return self
        head = 0 if self.tied else self.vocabulary * self.hidden
        return replace(self, parameters=self.parameters - head + self.hidden, classifier=True)


def read_size(model: Path) -> Size | None:
    """The measures of a model directory: shapes by config.json, counts by the headers of its safetensors files.

    Without weights the counts are those of a Llama: each layer has 2 h·q + 2 h·k (attention, of query width q and
    key width k), 3 h·i (feed-forward, times the experts) and 2 h (norms), and embedding, final norm and LM head are
    2 V·h + h, or V·h + h where the head is tied. Of a model on the Hub (hf:ORG/NAME) the config.json in the local cache
    will do.
    """
    file = config_file(model)
    config = _read_json(file) if file else None
    if config is None:
        return None
    text = {**config, **(config.get("text_config") or {})}
    try:
        size = _from_config(text)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    others = sum((model / name).stat().st_size for name in MODEL_FILES if (model / name).is_file())
    size = replace(size, other_files=others)
    tensors: dict[str, int] = {}
    for file in sorted(model.glob("*.safetensors")):
        header = _header(file)
        if header is None:
            return None
        tensors |= header
    if not tensors:
        is_classifier = str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification")
        return size.as_classifier() if is_classifier else size
    if "tie_word_embeddings" not in text:  # the default is another for each architecture
        size = replace(size, tied=not any(map(_is_head, tensors)))
    head = sum(count for name, count in tensors.items() if _is_head(name)) if size.tied else 0
    total = sum(tensors.values())
    classifier = any(name.startswith("score.") for name in tensors)
    return replace(size, parameters=total - head, tensors=tensors, classifier=classifier)


def config_file(model: Path) -> Path | None:
    """The config.json of a model directory, or of hf:ORG/NAME[@REVISION] in the local cache; None if not there."""
    if not str(model).startswith("hf:"):
        return model / "config.json"
    name, revision = name_and_revision(model)
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _from_config(config: dict[str, Any]) -> Size:
    def first(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    hidden, layers = int(first("hidden_size", "n_embd", "d_model")), int(first("num_hidden_layers", "n_layer"))
    heads = int(first("num_attention_heads", "n_head"))
    head_width = int(first("head_dim") or hidden // heads)
    intermediate = int(first("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden)
    experts = int(first("num_local_experts", "num_experts", "n_routed_experts") or 1)
    expert_width = int(first("moe_intermediate_size") or intermediate) if experts > 1 else intermediate
    active = int(first("num_experts_per_tok") or 1) if experts > 1 else 1
    query, key = heads * head_width, int(first("num_key_value_heads") or heads) * head_width
    words = int(config["vocab_size"])
    tied = bool(config.get("tie_word_embeddings", False))
    layer = 2 * hidden * query + 2 * hidden * key + 3 * hidden * expert_width * experts + 2 * hidden
    body = layers * layer + words * hidden + hidden
    return Size(
        parameters=body + (0 if tied else words * hidden),
        hidden=hidden,
        layers=layers,
        intermediate=expert_width * active,
        query_width=query,
        key_width=key,
        vocabulary=words,
        tied=tied,
        context=first("max_position_embeddings", "n_positions"),
        model_type=str(config.get("model_type", "")),
    )


def _is_head(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith(".lm_head.weight")


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none to read: what is wrong with it is not for an estimate to say."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _header(file: Path) -> dict[str, int] | None:
    """Numbers in each tensor of a safetensors file, from its header; None where it is damaged."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length) if length < file.stat().st_size else b"")
        return {name: math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def size_of(model: Path, graph: Graph) -> Size | None:
    """The measures of a model: what a stage of the graph makes has those of the model that it starts from."""
    start, becomes_classifier = graph.origin(model)
    size = graph.known(("size", start), lambda: _size_of_start(start, graph))
    return size.as_classifier() if size and becomes_classifier else size


def _size_of_start(start: Path, graph: Graph) -> Size | None:
    """The measures of a model that is no training's: one from outside of the run, or the embedded world's."""
    owner = graph.owner(start)
    if owner is None:
        return read_size(start)
    config = graph.nodes[owner].config
    if not isinstance(config, WorldConfig):
        return None
    return _from_config(
        {
            "model_type": "llama",
            "hidden_size": config.hidden_size,
            "intermediate_size": 3 * config.hidden_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.hidden_size // 32,
            "head_dim": 32,
            "vocab_size": len(vocabulary()) + 16,  # with its special tokens, rounded up
            "tie_word_embeddings": True,
            "max_position_embeddings": 128,
        }
    )


@dataclass(frozen=True)
class Rows:
    """How much data there is."""

    count: int
    bytes: int
    """As JSONL."""
    longest: int
    """Bytes of the longest row."""

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest row in a chat template: of two bytes each, where four are usual."""
        return self.longest // 2 + TEMPLATE_TOKENS


@dataclass(frozen=True)
class Answers:
    """How much a generation stage samples."""

    prompts: Rows
    k: int
    longest_prompt: int
    """Tokens, and so is:"""
    longest_answer: int

    @property
    def count(self) -> int:
        """Answers to all prompts."""
        return self.prompts.count * self.k

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return self.longest_prompt + self.longest_answer


def measure(source: Path, split: str = "train") -> Rows | None:
    """Rows in a file, a directory's files of one split or a published artifact, of a large file by its first MiB."""
    if source.is_file():
        files = [source]
    elif (source / MANIFEST).is_file():
        files = sorted(source.glob("shard-*.jsonl"))
    elif source.is_dir():
        files = sorted(source.rglob("*.arrow"))
        try:
            files = files or choose_files(source, split)
        except UserError:  # which the stage tells
            return None
    else:
        return None
    try:
        parts = [_measure_file(file) for file in files]
    except OSError:
        return None
    return Rows(
        sum(part.count for part in parts),
        sum(part.bytes for part in parts),
        max((part.longest for part in parts), default=0),
    )


def _measure_file(file: Path, sample: int = 1 << 20) -> Rows:
    size = file.stat().st_size
    with file.open("rb") as stream:
        lines = stream.read(sample).splitlines(keepends=True)
    document = file.suffix == ".json" and lines and not lines[0].strip().endswith(b"}")
    if document or file.suffix not in LINES:
        times, row = (1, COMPRESSED[1]) if document else COMPRESSED
        return Rows(-(-times * size // row), times * size, times * size)
    if size > sample and len(lines) > 1:
        lines.pop()  # cut off
    if not lines:
        return Rows(0, 0, 0)
    read = sum(map(len, lines))
    count = len(lines) if size <= sample else -(-size * len(lines) // read)
    return Rows(count, size, max(map(len, lines)))


def rows_of(path: Path, graph: Graph) -> Rows | None:
    """Rows of prompts or demonstrations, before they are made; None where only the Hub knows."""
    return graph.known(("rows", path), lambda: _rows_of(path, graph))


def _rows_of(path: Path, graph: Graph) -> Rows | None:
    owner = graph.owner(path)
    config = graph.nodes[owner].config if owner else None
    if isinstance(config, WorldConfig):
        count = getattr(config, path.stem, 0)
        return Rows(count, count * WORLD_ROW, WORLD_ROW)
    if isinstance(config, PromptsConfig):
        where, split = config.source, config.split
        if graph.owner(where):
            source = rows_of(where, graph)
        else:
            source = graph.known(("rows", where, split), lambda: measure(where, split))
        source = source or measure(path)
        if source is None:
            return None
        count = min(source.count, config.limit or source.count)
        system = len((config.system or "").encode())
        share = source.bytes * count // max(1, source.count)
        return Rows(count, share + count * (PROMPT + system), source.longest + system)
    return measure(path)


def answers_of(path: Path, graph: Graph) -> Answers | None:
    """What the generation stage that makes `path` samples; None where that is not known."""
    owner = graph.owner(path)
    config = graph.nodes[owner].config if owner else None
    if not isinstance(config, GenerationConfig):
        return None
    prompts = rows_of(config.prompts, graph)
    size = size_of(config.policy, graph)
    limits = [config.max_prompt_tokens] if config.max_prompt_tokens is not None else []
    if size is not None and size.context is not None:
        limits.append(max(1, size.context - config.max_new_tokens))
    if prompts is not None:
        limits.append(prompts.longest_tokens)
    elif config.count is not None:
        prompts = Rows(config.count, config.count * UNSEEN, UNSEEN)
    if prompts is None:
        return None
    count = min(config.count or prompts.count, prompts.count)
    longest = min(limits, default=prompts.longest_tokens)
    share = prompts.bytes * count // max(1, prompts.count)
    return Answers(Rows(count, share, prompts.longest), config.k, longest, config.max_new_tokens)


def experience_of(path: Path, graph: Graph) -> Answers | None:
    """The answers that an experience stage makes its rows of: one row per prompt."""
    owner = graph.owner(path)
    config = graph.nodes[owner].config if owner else None
    return answers_of(config.rollouts, graph) if isinstance(config, ExperienceConfig) else None


def pairs_of(path: Path, graph: Graph) -> tuple[int, Answers] | None:
    """How many pairs a stage makes at most, and of which answers: one per prompt, or k (k - 1) / 2."""
    owner = graph.owner(path)
    config = graph.nodes[owner].config if owner else None
    answers = answers_of(config.rollouts, graph) if isinstance(config, PairsConfig) else None
    if answers is None:
        return None
    assert isinstance(config, PairsConfig)
    each = answers.k * (answers.k - 1) // 2 if config.strategy == "all" else 1
    return answers.prompts.count * each, answers
