"""Generates the model and the data for all sides of a benchmark from a seed, without downloads."""

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama; by default that of SmolLM2-135M."""

    layers: int = 30
    hidden: int = 576
    intermediate: int = 1536
    heads: int = 9
    kv_heads: int = 3
    vocabulary: int = 49152

    @property
    def layer_weights(self) -> int:
        """The number of weights in one layer's matrices."""
        keys = self.kv_heads * self.hidden // self.heads
        return 2 * self.hidden * (self.hidden + keys) + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """The number of weights of the whole model, whose LM head is tied to the embedding."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.layer_weights + self.vocabulary * self.hidden + norms

    def config(self, **more: Any) -> Any:
        """The model's transformers configuration; token 0 is the padding."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
            attention_dropout=0.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            attn_implementation="sdpa",
            **more,
        )

    def causal(self, seed: int) -> Any:
        """Create a causal language model with random fp32 weights from a seed."""
        import torch
        from transformers import LlamaForCausalLM

        torch.manual_seed(seed)
        return LlamaForCausalLM(self.config())

    def classifier(self, seed: int) -> Any:
        """Create a sequence classifier with one label: a critic or a reward model."""
        import torch
        from transformers import LlamaForSequenceClassification

        torch.manual_seed(seed)
        return LlamaForSequenceClassification(self.config(num_labels=1))


@dataclass(frozen=True)
class Pair:
    """A preference pair as token ids, with the summed reference log-probabilities of both answers."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    reference: tuple[float, float]

    @property
    def useful_tokens(self) -> int:
        """The tokens of both sequences, with the prompt in each and without padding, regardless of how they are
        computed."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class Rollout:
    """A sampled answer as token ids."""

    prompt: list[int]
    response: list[int]

    @property
    def useful_tokens(self) -> int:
        """The number of tokens of the sequence."""
        return len(self.prompt) + len(self.response)


def pairs(shape: Shape, *, count: int, prompt: int, answer: int, spread: float, seed: int) -> list[Pair]:
    """Generate pairs with log-normal lengths, whose medians are `prompt` and `answer` tokens.

    The reference values are those of a uniform model plus noise, so that the loss is near log 2 but not equal to it.
    """
    generator = random.Random(f"pairs-{seed}")
    prompts = texts_of(generator, shape, count, prompt, spread)
    answers = texts_of(generator, shape, 2 * count, answer, spread)
    values = [generator.gauss(-len(ids) * math.log(shape.vocabulary), 2.0) for ids in answers]
    return [
        Pair(ids, answers[2 * number], answers[2 * number + 1], (values[2 * number], values[2 * number + 1]))
        for number, ids in enumerate(prompts)
    ]


def rollouts(shape: Shape, *, count: int, prompt: int, answer: int, spread: float, seed: int) -> list[Rollout]:
    """Generate sampled answers with lengths as in `pairs`; each ends with EOS."""
    generator = random.Random(f"rollouts-{seed}")
    prompts = texts_of(generator, shape, count, prompt, spread)
    answers = texts_of(generator, shape, count, answer, spread)
    return [Rollout(ids, [*response[:-1], 2]) for ids, response in zip(prompts, answers, strict=True)]


def texts_of(generator: random.Random, shape: Shape, count: int, median: int, spread: float) -> list[list[int]]:
    """Generate texts of random tokens without special tokens. Their lengths are evenly spaced quantiles of the
    distribution in random order, so that all batches have short and long texts and the same number of tokens."""
    quantiles = [NormalDist().inv_cdf((number + 0.5) / count) for number in range(count)]
    lengths = [max(round(median * math.exp(spread * quantile)), 2) for quantile in quantiles]
    generator.shuffle(lengths)
    return [[generator.randrange(3, shape.vocabulary) for _ in range(length)] for length in lengths]


def write(path: Path, settings: dict[str, Any], shape: Shape, batches: list[list[Any]]) -> None:
    """Write the input of a side: settings, shape, and the rows of each optimizer step."""
    rows = [[asdict(row) for row in batch] for batch in batches]
    path.write_text(json.dumps({"settings": settings, "shape": asdict(shape), "batches": rows}))


def read(path: Path, kind: type[Any]) -> tuple[dict[str, Any], Shape, list[list[Any]]]:
    """Read a file written by `write`, with rows of the type `kind`."""
    found = json.loads(path.read_text())
    return found["settings"], Shape(**found["shape"]), [[kind(**row) for row in rows] for rows in found["batches"]]
