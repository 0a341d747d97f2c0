"""Reward models on vLLM's pooling engine, which has to say the same as transformers before it is believed."""

import gc
import json
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig

from annotation.models.loading import accelerators, load_model
from annotation.models.reading import HALF_TOLERANCE, Numbers
from annotation.models.reward_model import RewardModel, own_rewards
from annotation.samples import Sample
from annotation.scorers.base import ModelSettings
from annotation.scorers.reward_model import LEAST_CACHE, MOST_SEQUENCES, RewardModelConfig, cache_bytes
from contracts.architectures import context_switch, text_settings
from contracts.attempt import beat
from contracts.chat import ChatTokenizer
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.model_size import size_by
from contracts.records import Message, Score
from modeling.loading import load_classifier
from modeling.rows import Row
from modeling.vllm_process import CPU_STEP, beat_with_every_step, set_environment

TRIED = (3, 40, 129, 300)
"""Tokens of the sequences that both engines score when one is opened, beside a conversation."""
CONVERSATION = (Message("user", "What is the capital of France?"), Message("assistant", "It is Paris."))
TOLERANCE = 1e-3
"""How far their scores may differ in float32, relative to the largest one (to 1 at least); in half precision it is that
of reading.py."""


class PooledRewardModel(RewardModel):
    """The same conversations and scores as a `RewardModel`, by vLLM.

    All sequences of a shard are given to the engine in the same order, and what it keeps of the beginnings that they
    share is forgotten before the next shard, so that scores do not depend on what was scored before.
    """

    def __init__(self, config: RewardModelConfig, longest: int | None) -> None:
        assert config.model is not None
        if accelerators() > 1 and int(os.environ.get("LOCAL_RANK", "0")):
            raise UserError(
                "engine=vllm takes the first device that a process sees, so a launcher's processes would share one. "
                "Set replicas=N instead of starting them with a launcher."
            )
        self.path = config.model
        self.longest = longest
        self.chat = ChatTokenizer(config.model, config.chat_template_kwargs, config.date)
        self.budget = config.batch_tokens
        self.counts = {}
        tried = self._tried()
        expected, dtype = _by_transformers(config, tried)
        self._open(config, dtype)
        self._require_parity(tried, expected, dtype)

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """As a `RewardModel`."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        return super().__call__(samples)

    def read(self, rows: Sequence[Row]) -> list[Numbers]:
        """The rewards of all rows' responses."""
        sequences = [[*row.prompt.tolist(), *response.ids.tolist()] for row in rows for response in row.responses]
        rewards = iter(self.rewards(sequences))
        return [[[next(rewards)] for _ in row.responses] for row in rows]

    def rewards(self, sequences: Sequence[list[int]]) -> list[float]:
        """The rewards of whole sequences."""
        params = self._pooling_params(use_activation=False)  # by default it puts a sigmoid behind the head
        prompts = [{"prompt_token_ids": sequence} for sequence in sequences]
        outputs = self.llm.classify(prompts, pooling_params=params, use_tqdm=False)
        return [float(output.outputs.probs[0]) for output in outputs]

    def _tried(self) -> list[list[int]]:
        """Sequences of tokens drawn at random, and a conversation, as far as they fit the limit."""
        size = int(AutoConfig.from_pretrained(self.path, local_files_only=True).get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randint(0, size, (tokens,), generator=generator).tolist() for tokens in TRIED]
        sequences = [*drawn, self.chat.conversation(CONVERSATION)]
        return [sequence[: self.longest] for sequence in sequences]

    def _open(self, config: RewardModelConfig, dtype: str) -> None:
        # The scheduler runs in this process, so that what is computed together does not depend on time.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        set_environment(on_gpu=torch.cuda.is_available())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's own use of deprecated functions
            import vllm

            self._pooling_params: Any = vllm.PoolingParams
            try:
                self.llm: Any = vllm.LLM(**_arguments(config, self.longest, dtype))
            except torch.OutOfMemoryError:
                raise
            except (ValueError, RuntimeError) as error:
                raise UserError(
                    f"vLLM {vllm.__version__} cannot compute {self.path} as a reward model: {_first_line(error)}. Set "
                    "engine=transformers."
                ) from error
        beat_with_every_step(self.llm)
        self.facts = {
            "dtype": dtype,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "engine": "vllm",
            "engine_version": str(vllm.__version__),
        }

    def _require_parity(self, tried: list[list[int]], expected: list[float], dtype: str) -> None:
        """Compare what the engine says with what transformers has said.

        Raises:
            UserError: one of the numbers is another.
        """
        found = self.rewards(tried)
        allowed = (TOLERANCE if dtype == "float32" else HALF_TOLERANCE) * max(1.0, *map(abs, expected))
        pairs = zip(tried, found, expected, strict=True)
        sequence, one, other = max(pairs, key=lambda each: _distance(each[1], each[2]))
        if not _distance(one, other) <= allowed:
            raise UserError(
                f"vLLM {self.facts['engine_version']} gives {one:.6g} for a sequence of {len(sequence)} tokens that "
                f"transformers gives {other:.6g} with {self.path}; in {dtype} they may differ by {allowed:.3g}. Set "
                "engine=transformers, or take another version of vLLM."
            )
        self.facts["engine_difference"] = f"{_distance(one, other):.1e}"


def open_reader(config: RewardModelConfig, longest: int | None) -> RewardModel:
    """The reader of a reward model by its engine."""
    return (PooledRewardModel if config.engine == "vllm" else RewardModel)(config, longest)


@torch.inference_mode()
def _by_transformers(config: ModelSettings, sequences: list[list[int]]) -> tuple[list[float], str]:
    """The rewards of sequences one by one, and the number format; nothing of the model stays in memory."""
    model = load_model(config, load_classifier)
    rewards = []
    for sequence in sequences:
        beat()
        rewards += own_rewards(model, [sequence])
    dtype = str(model.dtype).removeprefix("torch.")
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return rewards, dtype


def _arguments(config: RewardModelConfig, longest: int | None, dtype: str) -> dict[str, Any]:
    """vLLM's engine arguments."""
    assert config.model is not None
    settings: dict[str, Any] = json.loads((config.model / "config.json").read_bytes())
    # It takes longrope's long factors only where it is prepared for sequences that need them.
    most = max(longest or 0, (context_switch(settings) or -1) + 1)
    size = size_by(dict(text_settings(settings)))
    number = 4 if dtype == "float32" else 2
    arguments: dict[str, Any] = {
        "model": str(config.model),
        "runner": "pooling",
        "convert": "classify",
        "dtype": dtype,
        "max_num_seqs": MOST_SEQUENCES,
        "max_num_batched_tokens": config.batch_tokens,
        "kv_cache_memory_bytes": cache_bytes(size, most, config.batch_tokens, number) if most else LEAST_CACHE,
        "seed": 0,
        "use_tqdm_on_load": False,
    }
    if most:
        arguments["max_model_len"] = most
    if not torch.cuda.is_available():
        arguments["enforce_eager"] = True
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(CPU_STEP, most, MOST_SEQUENCES)
    return arguments | config.engine_args


def _distance(one: float, other: float) -> float:
    """Infinite where one of them is no number."""
    return math.inf if math.isnan(one - other) else abs(one - other)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")
