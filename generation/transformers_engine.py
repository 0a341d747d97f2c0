"""Sampling engine on transformers alone, for platforms without vLLM.

The prompts of a batch are padded on the left and prefilled once each; their caches are repeated for the n answers. Each
answer has its own random generator, so its tokens do not depend on the rest of the batch, except for the last bits of
the model's logits.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from msgspec import UNSET
from transformers import DynamicCache

from contracts.attempt import beat
from contracts.files import process_name
from contracts.records import FinishReason, Sampling
from contracts.tokenizer import load_tokenizer
from generation.config import GenerationConfig
from generation.engine import Answer, EngineSettings, GenerationRequest
from generation.stop_strings import StopStrings
from modeling.loading import load_causal
from modeling.tracing import traced


class TransformersEngine:
    """One model on one device, or with tensor_parallel > 1 spread over the visible GPUs."""

    def __init__(self, config: GenerationConfig, settings: EngineSettings) -> None:
        self._device = "cuda" if settings.on_gpu else "cpu"
        placement: Any = "auto" if config.tensor_parallel > 1 else None
        model = load_causal(config.policy, getattr(torch, settings.dtype), device_map=placement)
        self._model = (model if placement else model.to(self._device)).eval()
        self._stop_ids = torch.tensor(settings.stop_ids, device=self._device)
        self._processed = config.logprob_mode == "processed"
        self._batch_size = config.max_num_seqs
        self._tokenizer = load_tokenizer(config.policy).backend_tokenizer if config.stop else None
        self._traces = settings.traces

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerationRequest], batch: str) -> list[list[Answer]]:
        """Answer all requests, at most `max_num_seqs` samples at a time."""
        answers: list[list[Answer]] = [[] for _ in requests]
        samples = [(index, j) for index, request in enumerate(requests) for j in range(request.n)]
        for start in range(0, len(samples), self._batch_size):
            chunk = samples[start : start + self._batch_size]
            for (index, _), answer in zip(chunk, self._sample(requests, chunk), strict=True):
                answers[index].append(answer)
        return answers

    def _sample(self, requests: Sequence[GenerationRequest], chunk: list[tuple[int, int]]) -> Iterator[Answer]:
        """Sample the answers `(request, number)` of `chunk` together."""
        seeds = [requests[index].seed + j for index, j in chunk]
        settings = [requests[index].sampling for index, _ in chunk]
        prompts = [requests[index].prompt_ids for index, _ in chunk]
        sampler = _Sampler(settings, seeds, prompts, self._stop_ids, self._processed)
        watches = [self._watch(prompt, sampling) for prompt, sampling in zip(prompts, settings, strict=True)]
        distinct = list(dict.fromkeys(index for index, _ in chunk))
        rows_of_prompts = torch.tensor([distinct.index(index) for index, _ in chunk], device=self._device)

        # Prefill: every distinct prompt once.
        ids_PL, mask_PL = self._pad([requests[index].prompt_ids for index in distinct])
        cache = DynamicCache(config=self._model.config)
        logits_PV = self._forward(ids_PL, mask_PL, cache)
        cache.batch_select_indices(rows_of_prompts)
        logits_BV, mask_BL = logits_PV[rows_of_prompts], mask_PL[rows_of_prompts]

        # Decode: `alive` are the rows of the chunk that are still being sampled.
        tokens: list[list[int]] = [[] for _ in chunk]
        logprobs: list[list[float]] = [[] for _ in chunk]
        ends: list[FinishReason] = ["length"] * len(chunk)
        strings: list[str | None] = [None] * len(chunk)
        alive = torch.arange(len(chunk), device=self._device)
        for step in range(max(requests[index].sampling.max_tokens for index, _ in chunk)):
            beat()
            token_B, logprob_B = sampler(logits_BV, alive, step)
            ends_B = torch.isin(token_B, self._stop_ids)
            for row, token, logprob, stops in zip(
                alive.tolist(), token_B.tolist(), logprob_B.tolist(), ends_B.tolist(), strict=True
            ):
                tokens[row].append(token)
                logprobs[row].append(logprob)
                if stops:
                    ends[row] = "stop"
                elif (watch := watches[row]) is not None and (found := watch.add(token)) is not None:
                    ends[row], strings[row] = "stop_string", found
            done = [ends[row] != "length" or len(tokens[row]) == settings[row].max_tokens for row in alive.tolist()]
            goes_on = (~torch.tensor(done, device=self._device)).nonzero().squeeze(1)
            if not len(goes_on):
                break
            if len(goes_on) < len(alive):
                cache.batch_select_indices(goes_on)
                alive, mask_BL, token_B = alive[goes_on], mask_BL[goes_on], token_B[goes_on]
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(alive), 1)], dim=1)
            logits_BV = self._forward(token_B[:, None], mask_BL, cache)
        for ids, values, end, seed, string in zip(tokens, logprobs, ends, seeds, strings, strict=True):
            yield Answer(tuple(ids), tuple(values), end, seed, string)

    def _watch(self, prompt_ids: Sequence[int], sampling: Sampling) -> StopStrings | None:
        stop, min_tokens = sampling.stop or (), sampling.min_tokens or 0
        return StopStrings(self._tokenizer, prompt_ids, stop, min_tokens) if stop else None

    def reset(self) -> None:
        """Do nothing: no cache outlives a batch."""

    def profile(self, name: str) -> AbstractContextManager[None]:
        """Trace with torch's profiler."""
        assert self._traces is not None
        return traced(self._traces / f"{name}-{process_name()}.json.gz")

    def close(self) -> None:
        """Do nothing: there are no other processes."""

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, padded on the left; the padding's token id does not matter, because it is masked."""
        length = max(map(len, prompts))
        ids = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(ids, device=self._device), torch.tensor(mask, device=self._device)

    def _forward(self, ids_BT: torch.Tensor, mask_BL: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits of the next token, in float32; `ids_BT` are the last T of the L positions of `mask_BL`."""
        positions = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        output = self._model(
            input_ids=ids_BT,
            attention_mask=mask_BL,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits


class _Sampler:
    """Draws the next token of each row by inverting its cumulative distribution.

    The order of the steps is vLLM's: minimum length, penalties, temperature, min-p, top-k, nucleus.
    """

    def __init__(
        self,
        sampling: Sequence[Sampling],
        seeds: Sequence[int],
        prompts: Sequence[Sequence[int]],
        stop_ids: torch.Tensor,
        processed: bool,
    ) -> None:
        device = stop_ids.device
        self._processed = processed
        self._stop_ids = stop_ids
        self._prompts = prompts
        self._counts_NV: torch.Tensor | None = None
        self._in_prompt_NV: torch.Tensor | None = None
        temperatures = torch.tensor([one.temperature for one in sampling], device=device)
        self._greedy_B = temperatures == 0
        self._temperature_B = torch.where(self._greedy_B, 1.0, temperatures)
        # These are the same for all rows except greedy ones, whose token the filters do not change.
        self._top_p = min(one.top_p for one in sampling)
        self._top_k = max(one.top_k for one in sampling)
        self._min_p = max(one.min_p or 0.0 for one in sampling)
        self._min_tokens = sampling[0].min_tokens or 0
        self._repetition = 1.0 if sampling[0].repetition_penalty is UNSET else sampling[0].repetition_penalty
        self._presence = sampling[0].presence_penalty or 0.0
        self._frequency = sampling[0].frequency_penalty or 0.0
        self._penalises = (self._repetition, self._presence, self._frequency) != (1.0, 0.0, 0.0)
        steps = max(one.max_tokens for one in sampling)
        # Drawn on the CPU in any case, so that they are the same on a GPU.
        draws = [
            torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds
        ]
        self._uniform_BT = torch.stack(draws).to(device)

    def __call__(self, logits_BV: torch.Tensor, rows: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample tokens, and return them with their log-probabilities; `rows` are the samples' indices."""
        own_BV = logits_BV
        greedy_B1 = self._greedy_B[rows, None]
        if step < self._min_tokens:
            logits_BV = logits_BV.index_fill(1, self._stop_ids, -torch.inf)
        if self._penalises:
            logits_BV = self._penalise(logits_BV, rows)
        scaled_BV = logits_BV / self._temperature_B[rows, None]
        processed_BV = torch.where(greedy_B1, logits_BV, self._filter(scaled_BV)).log_softmax(-1)
        cumulative_BV = processed_BV.double().exp().cumsum(-1)
        total_B1 = cumulative_BV[:, -1:]
        # Below the total, so that the sampled token has a probability above zero.
        threshold_B1 = torch.minimum(
            self._uniform_BT[rows, step, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1))
        )
        drawn_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True)
        token_B1 = torch.where(greedy_B1, logits_BV.argmax(-1, keepdim=True), drawn_B1)
        if self._counts_NV is not None:
            self._counts_NV[rows, token_B1.squeeze(1)] += 1
        kept_BV = processed_BV if self._processed else own_BV.log_softmax(-1)
        return token_B1.squeeze(1), kept_BV.gather(1, token_B1).squeeze(1)

    def _penalise(self, logits_BV: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Apply the repetition penalty (Keskar et al. 2019, arXiv 1909.05858) to tokens in prompt and answer, and the
        OpenAI API's presence and frequency penalties to those in the answer."""
        if self._counts_NV is None or self._in_prompt_NV is None:
            shape = (len(self._prompts), logits_BV.shape[1])
            self._counts_NV = logits_BV.new_zeros(shape)
            self._in_prompt_NV = torch.zeros(shape, dtype=torch.bool, device=logits_BV.device)
            for row, prompt in enumerate(self._prompts):
                self._in_prompt_NV[row, list(prompt)] = True
        counts_BV = self._counts_NV[rows]
        if self._repetition != 1.0:
            seen_BV = self._in_prompt_NV[rows] | (counts_BV > 0)
            scaled_BV = torch.where(logits_BV > 0, logits_BV / self._repetition, logits_BV * self._repetition)
            logits_BV = torch.where(seen_BV, scaled_BV, logits_BV)
        return logits_BV - self._frequency * counts_BV - self._presence * (counts_BV > 0)

    def _filter(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Apply min-p (arXiv 2407.01082), top-k and nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751), in this
        order."""
        if self._min_p:
            probability_BV = logits_BV.softmax(-1)
            least_B1 = self._min_p * probability_BV.amax(-1, keepdim=True)
            logits_BV = logits_BV.masked_fill(probability_BV < least_B1, -torch.inf)
        if self._top_k and self._top_k < logits_BV.shape[1]:
            smallest_B1 = logits_BV.topk(self._top_k).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
        if self._top_p < 1:
            sorted_BV, order_BV = logits_BV.sort(descending=True)
            probability_BV = sorted_BV.softmax(-1)
            # A token is kept if the more likely ones do not reach top_p; the first always is.
            beyond_BV = probability_BV.cumsum(-1) - probability_BV >= self._top_p
            logits_BV = logits_BV.masked_fill(torch.zeros_like(beyond_BV).scatter(1, order_BV, beyond_BV), -torch.inf)
        return logits_BV
