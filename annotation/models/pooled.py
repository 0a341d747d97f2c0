"""Runs reward, pairwise and process reward models on vLLM's pooling engine, after a check that it agrees with
transformers."""

import functools
import gc
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from annotation.models.comparisons import Opponents
from annotation.models.loading import accelerators, load_model
from annotation.models.pairwise import PairwiseModel
from annotation.models.process_reward import ProcessRewardModel, own_log_odds
from annotation.models.reader import HALF_TOLERANCE, ModelReader, Numbers
from annotation.models.reward_model import RewardModel, own_rewards
from annotation.samples import Sample
from annotation.scorers.base import ModelSettings
from annotation.scorers.pairwise import PairwiseConfig
from annotation.scorers.pooling import MAX_SEQUENCES, MIN_CACHE, PooledSettings, cache_bytes
from annotation.scorers.process_reward import ProcessRewardConfig
from annotation.scorers.reward_model import RewardModelConfig
from contracts.architectures import context_switch, text_settings
from contracts.attempt import beat
from contracts.chat import ChatTokenizer
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.model_size import size_from_config
from contracts.models import PROCESS_MODEL
from contracts.pairwise import PairwiseChat
from contracts.records import Message, Score
from modeling.heads import logit_scaling
from modeling.loading import load_causal, load_classifier, load_token_classifier
from modeling.logprobs import PLAIN
from modeling.rows import Row
from modeling.vllm_process import CPU_STEP, beat_with_every_step, set_environment

PROBE_LENGTHS = (3, 40, 129, 300)
"""Lengths of the random sequences that both engines score in the parity check, in addition to a conversation."""
CONVERSATION = (Message("user", "What is the capital of France?"), Message("assistant", "It is Paris."))
TOLERANCE = 1e-3
"""Maximum difference of their scores in float32, relative to the largest one (to at least 1). In half precision it is
`HALF_TOLERANCE` of reader.py."""


class _Pooled(ModelReader):
    """Mixin that computes a reader's numbers with vLLM; it precedes the transformers reader in a class's bases."""

    engine: "PoolingEngine"

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """Score like the transformers reader, starting with an empty prefix cache."""
        self.engine.reset_cache()
        return super().__call__(samples)

    def read(self, rows: Sequence[Row]) -> list[Numbers]:
        """The numbers of all rows' responses, in the form in which the transformers reader returns them."""
        return self.engine.read(rows)


class PooledRewardModel(_Pooled, RewardModel):
    """A `RewardModel` whose scores are computed by vLLM."""

    def __init__(self, config: RewardModelConfig, longest: int | None) -> None:
        assert config.model is not None
        self.path, self.longest, self.budget, self.counts = config.model, longest, config.batch_tokens, {}
        self.chat = ChatTokenizer(config.model, config.chat_template_kwargs, config.date)
        spec = _ModelSpec(load_classifier, own_rewards, self.chat.conversation(CONVERSATION), {})
        self.engine = PoolingEngine(config, longest, spec)
        self.facts = self.engine.facts


class PooledPairwiseModel(_Pooled, PairwiseModel):
    """A `PairwiseModel` whose scores are computed by vLLM, as a classifier built from the LM head's rows for the two
    labels."""

    def __init__(self, config: PairwiseConfig, longest: int | None) -> None:
        assert config.model is not None
        self.path, self.longest, self.budget, self.counts = config.model, longest, config.batch_tokens, {}
        self.opponents = Opponents(config.opponents, config.against)
        self.chat = PairwiseChat(config.model, config.chat_template_kwargs, config.date)
        labels = self.chat.label_ids
        asked, first = CONVERSATION
        question = self.chat.token_ids([asked], first.content, "I do not know.", what="two answers")
        names = self.chat.chat.tokenizer.convert_ids_to_tokens([*labels])
        overrides = {"method": "from_2_way_softmax", "classifier_from_token": names[::-1]}  # second minus first
        spec = _ModelSpec(_load_plain, functools.partial(_differences, labels), question, overrides)
        self.engine = PoolingEngine(config, longest, spec)
        self.facts = self.engine.facts


class PooledProcessRewardModel(_Pooled, ProcessRewardModel):
    """A `ProcessRewardModel` whose scores are computed by vLLM, which returns the numbers at every token."""

    def __init__(self, config: ProcessRewardConfig, longest: int | None) -> None:
        assert config.model is not None
        self.path, self.longest, self.budget, self.counts = config.model, longest, config.batch_tokens, {}
        self.open_tokenizers(config)
        probe = self.steps.chat.conversation(CONVERSATION)
        if config.loaded_as() == "causal":
            labels = self.steps.label_ids
            names = self.steps.chat.tokenizer.convert_ids_to_tokens([*labels])
            overrides = {"method": "from_2_way_softmax", "classifier_from_token": names}  # second minus first
            numbers = functools.partial(own_log_odds, labels)
            spec = _ModelSpec(_load_plain, numbers, probe, overrides, per_token=True)
        else:
            numbers = functools.partial(own_log_odds, (0, 1))
            spec = _ModelSpec(load_token_classifier, numbers, probe, {}, per_token=True)
        self.engine = PoolingEngine(config, longest, spec)
        self.facts = self.engine.facts


def open_reward_model(config: RewardModelConfig, longest: int | None) -> RewardModel:
    """Open a reward model on the configured engine."""
    return (PooledRewardModel if config.engine == "vllm" else RewardModel)(config, longest)


def open_pairwise(config: PairwiseConfig, longest: int | None) -> PairwiseModel:
    """Open a pairwise model on the configured engine."""
    return (PooledPairwiseModel if config.engine == "vllm" else PairwiseModel)(config, longest)


def open_process_reward(config: ProcessRewardConfig, longest: int | None) -> ProcessRewardModel:
    """Open a process reward model on the configured engine."""
    return (PooledProcessRewardModel if config.engine == "vllm" else ProcessRewardModel)(config, longest)


class _ModelSpec(NamedTuple):
    """How transformers computes a model's numbers for a sequence, and what vLLM needs to compute the same."""

    load: Callable[[Path, torch.dtype], Any]
    numbers: Callable[[Any, list[list[int]]], list[float]]
    """Function of the model and token sequences, which returns one number per sequence, or per token of each."""
    probes: list[int]
    """A typical input, for the parity check."""
    overrides: dict[str, Any]
    """vLLM's `hf_overrides` of the model's configuration."""
    per_token: bool = False
    """Whether the model computes a number for each token."""


class PoolingEngine:
    """vLLM with a model that computes one number per sequence or token, checked against transformers when it is opened.

    The sequences of a shard are passed to the engine in a fixed order, and its prefix cache is reset before each shard,
    so that results do not depend on what was computed before.
    """

    def __init__(self, config: PooledSettings, longest: int | None, spec: _ModelSpec) -> None:
        """Open the engine, and compare it with transformers.

        Raises:
            UserError: vLLM does not support the model, or its results differ.
        """
        assert config.model is not None
        if accelerators() > 1 and int(os.environ.get("LOCAL_RANK", "0")):
            raise UserError(
                "engine=vllm takes the first device that a process sees, so a launcher's processes would share one. "
                "Set replicas=N instead of starting them with a launcher."
            )
        self.path, self.per_token = config.model, spec.per_token
        probes = [sequence[:longest] for sequence in (*self._random_sequences(), spec.probes)]
        expected, dtype = _reference_numbers(config, probes, spec)
        self._open(config, _arguments(config, longest, dtype, spec.overrides), dtype)
        self._require_parity(probes, expected, dtype)

    def reset_cache(self) -> None:
        """Reset the prefix cache."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")

    def read(self, rows: Sequence[Row]) -> list[Numbers]:
        """The numbers of all rows' responses."""
        sequences = [[*row.prompt.tolist(), *response.ids.tolist()] for row in rows for response in row.responses]
        numbers = iter(self.numbers(sequences))
        return [[next(numbers)[self._first(row) :] for _ in row.responses] for row in rows]

    def _first(self, row: Row) -> int:
        """Index of a response's first number among those of its sequence."""
        return len(row.prompt) if self.per_token else 0

    def numbers(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """The numbers of whole sequences: one for each, or one for each of its tokens."""
        params = self._pooling_params(use_activation=False)  # by default vLLM applies a sigmoid after the head
        prompts = [{"prompt_token_ids": sequence} for sequence in sequences]
        if not self.per_token:
            outputs = self.llm.classify(prompts, pooling_params=params, use_tqdm=False)
            return [[float(output.outputs.probs[0])] for output in outputs]
        outputs = self.llm.encode(prompts, pooling_params=params, pooling_task="token_classify", use_tqdm=False)
        labels = [output.outputs.data.float() for output in outputs]  # one column for a difference, or two
        return [(each[:, -1] - each[:, 0] if each.shape[1] == 2 else each[:, 0]).tolist() for each in labels]

    def _random_sequences(self) -> list[list[int]]:
        """Sequences of random tokens, of the lengths in `PROBE_LENGTHS`."""
        size = int(AutoConfig.from_pretrained(self.path, local_files_only=True).get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(0, size, (tokens,), generator=generator).tolist() for tokens in PROBE_LENGTHS]

    def _open(self, config: PooledSettings, arguments: dict[str, Any], dtype: str) -> None:
        # The scheduler runs in this process, so that the composition of batches does not depend on timing.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        set_environment(on_gpu=torch.cuda.is_available())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's own use of deprecated functions
            import vllm

            self._pooling_params: Any = vllm.PoolingParams
            if self.per_token:
                arguments |= {"pooler_config": vllm.config.PoolerConfig(task="token_classify", tok_pooling_type="ALL")}
            try:
                self.llm: Any = vllm.LLM(**arguments)
            except torch.OutOfMemoryError:
                raise
            except (ValueError, RuntimeError, AttributeError) as error:  # vLLM's conversion to a classifier failed
                raise UserError(
                    f"vLLM {vllm.__version__} cannot compute {self.path} as {config.pooled_as}: {_first_line(error)}. "
                    "Set engine=transformers."
                ) from error
        beat_with_every_step(self.llm)
        self.facts = {
            "dtype": dtype,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "engine": "vllm",
            "engine_version": str(vllm.__version__),
        }

    def _require_parity(self, probes: list[list[int]], expected: list[list[float]], dtype: str) -> None:
        """Compare the engine's results with those of transformers.

        Raises:
            UserError: a result differs by more than the tolerance.
        """
        found = self.numbers(probes)
        largest = max(abs(number) for numbers in expected for number in numbers)
        allowed = (TOLERANCE if dtype == "float32" else HALF_TOLERANCE) * max(1.0, largest)
        pairs = [
            (sequence, *numbers)
            for sequence, *both in zip(probes, found, expected, strict=True)
            for numbers in zip(*both, strict=True)
        ]
        sequence, one, other = max(pairs, key=lambda each: _distance(each[1], each[2]))
        if not _distance(one, other) <= allowed:
            raise UserError(
                f"vLLM {self.facts['engine_version']} gives {one:.6g} for a sequence of {len(sequence)} tokens that "
                f"transformers gives {other:.6g} with {self.path}; in {dtype} they may differ by {allowed:.3g}. Set "
                "engine=transformers, or take another version of vLLM."
            )
        self.facts["engine_difference"] = f"{_distance(one, other):.1e}"


@torch.inference_mode()
def _reference_numbers(
    config: ModelSettings, sequences: list[list[int]], spec: _ModelSpec
) -> tuple[list[list[float]], str]:
    """The model's numbers for each sequence, computed one at a time, and its dtype; the model is freed afterwards."""
    model = load_model(config, spec.load)
    numbers = []
    for sequence in sequences:
        beat()
        numbers.append(spec.numbers(model, [sequence]))
    dtype = str(model.dtype).removeprefix("torch.")
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return numbers, dtype


def _load_plain(path: Path, dtype: torch.dtype) -> Any:
    """Load a language model whose head vLLM can turn into a classifier.

    Raises:
        UserError: its LM head has a bias, or its logits are scaled or capped, which vLLM's classifier ignores.
    """
    model = load_causal(path, dtype)
    biased = getattr(model.get_output_embeddings(), "bias", None) is not None
    if biased or logit_scaling(model) != PLAIN:
        raise UserError(
            f"{path} {'has a bias in' if biased else 'scales or bounds what comes out of'} its LM head, which vLLM "
            "leaves out where it makes a classifier of it. Set engine=transformers."
        )
    return model


def _differences(labels: tuple[int, int], model: Any, sequences: list[list[int]]) -> list[float]:
    """log p(A) - log p(B) for the token that follows each sequence, from the model's own forward pass."""
    logits = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1].float() for ids in sequences]
    return [float(each[labels[0]] - each[labels[1]]) for each in logits]


def _arguments(config: PooledSettings, longest: int | None, dtype: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """vLLM's engine arguments."""
    assert config.model is not None
    settings: dict[str, Any] = json.loads((config.model / "config.json").read_bytes())
    # vLLM uses longrope's long factors only if max_model_len exceeds the original context.
    most = max(longest or 0, (context_switch(settings) or -1) + 1)
    size = size_from_config(dict(text_settings(settings)))
    number = 4 if dtype == "float32" else 2
    arguments: dict[str, Any] = {
        "model": str(config.model),
        "runner": "pooling",
        "convert": "none" if PROCESS_MODEL in settings.get("architectures", []) else "classify",
        "dtype": dtype,
        "max_num_seqs": MAX_SEQUENCES,
        "max_num_batched_tokens": config.batch_tokens,
        "kv_cache_memory_bytes": cache_bytes(size, most, config.batch_tokens, number) if most else MIN_CACHE,
        "seed": 0,
        "use_tqdm_on_load": False,
    }
    if overrides:
        arguments["hf_overrides"] = overrides
    if most:
        arguments["max_model_len"] = most
    if not torch.cuda.is_available():
        arguments["enforce_eager"] = True
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(CPU_STEP, most, MAX_SEQUENCES)
    return arguments | config.engine_args


def _distance(one: float, other: float) -> float:
    """Absolute difference; infinite if either number is NaN."""
    return math.inf if math.isnan(one - other) else abs(one - other)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")
