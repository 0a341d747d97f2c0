"""Runs the forward passes of scorer models: all answers to a prompt in one pass, with the shared prefix computed once.

Architectures for which `modeling/` has packed attention (contracts/architectures.py) use flat batches without padding.
All others, and those whose results differ in flat batches, use padded batches and the model's own forward pass. The
choice is made once, when the model is opened, by its architecture and by computing a few sequences both ways.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from annotation.models.batching import batches, row_batches
from annotation.models.loading import compute_facts, load_model
from annotation.samples import Sample
from annotation.scorers.base import CPU_TOKENS, ModelSettings
from contracts.architectures import support_of
from contracts.attempt import beat
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.records import Score
from modeling.attention import attention_on, use_packed_attention
from modeling.cpu import CpuDecoder, has_fast_cpu_decoder
from modeling.heads import logit_scaling
from modeling.logprobs import LogprobHead
from modeling.modules import Trained
from modeling.packing import Packed, pack
from modeling.probe import length_of
from modeling.rows import Response, Row, token_ids

BATCHES = 8
"""Number of batches that are tokenized ahead as one chunk, while the previous chunk is computed."""
PROBE = ((5, (1, 6, 3)), (8, (2, 4)))
"""Lengths of the prompts, and of the answers to each, that are computed both ways when a model is opened."""
TOLERANCE = {torch.float32: 1e-4}
"""Maximum difference of the two results, relative to the largest number (to at least 1), by dtype."""
HALF_TOLERANCE = 0.1
"""The tolerance in bfloat16, whose rounding error is not much smaller; a wrong mask or position exceeds it by far."""

Numbers = list[list[float]]
"""The results for a row: for each response, one number or one per token."""


class ModelReader:
    """A model that computes numbers for sequences: one per sequence, or one per response token."""

    per_token: ClassVar[bool] = False
    only_last: ClassVar[bool] = False
    """Whether only the last token of each sequence is read; `packed_numbers` then gets only these tokens' states."""
    head: Any
    """The head that turns hidden states into numbers, if prompts are shared."""

    def __init__(self, config: ModelSettings, longest: int | None, load: Callable[[Path, torch.dtype], Any]) -> None:
        self.path = config.model
        self.longest = longest
        self._load: Callable[[], Any] = functools.partial(load_model, config, load)
        self.model = self._load()
        self._decoder: CpuDecoder | None = None
        self.limit = config.batch_tokens
        on_cpu = self.model.device.type == "cpu"
        self.budget = min(self.limit, CPU_TOKENS) if on_cpu else self.limit
        self.shares_prompts = False
        self.facts = {
            **compute_facts(self.model),
            "packing": "padded",
            "attention": str(self.model.config._attn_implementation),
        }
        self.counts: dict[str, int] = {}

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """Score the samples of one shard, in order; a string is the reason why a sample is dropped."""
        raise NotImplementedError

    def read(self, rows: Sequence[Row]) -> list[Numbers]:
        """The numbers for all responses of all rows."""
        found: list[Numbers] = self._shared(rows) if self.shares_prompts else self._padded(rows)
        return found

    def packed_numbers(self, batch: Packed, hidden: Any) -> list[float]:
        """The numbers for a flat batch, one response after the other.

        Args:
            hidden: last hidden states, [tokens, hidden size]; with `only_last` [sequences, hidden size].
        """
        raise NotImplementedError

    def padded_numbers(self, sequences: list[list[int]], sizes: list[int]) -> list[float]:
        """The numbers for whole sequences, computed as a padded batch with the model's own forward pass.

        Args:
            sizes: number of response tokens of each sequence.
        """
        raise NotImplementedError

    def share_prompts_before_head(self) -> None:
        """`share_prompts` for a model that is read through its LM head, if its scaling of logits is known."""
        try:
            scaling = logit_scaling(self.model)
        except UserError:  # only the model's own forward pass computes them
            return
        self.head = LogprobHead(self.model.get_output_embeddings(), scaling)
        self.share_prompts()

    def share_prompts(self) -> None:
        """Use flat batches from now on, if the model's results for them are the same as for padded ones."""
        config = self.model.config
        try:
            known = support_of(config.to_dict()) == "flat"
        except UserError:  # not supported as a policy: reward models may also be encoders
            known = False
        if not known:
            return
        rows = list(self._probes())
        expected = _flat(self._padded(rows))
        before = [(each, each._attn_implementation) for each in (config.get_text_config(), config)]
        use_packed_attention(self.model)
        if has_fast_cpu_decoder(self.model):
            self._decoder = CpuDecoder(self.model)
        found = _flat(self._shared(rows))
        scale = max(1.0, *map(abs, expected))
        tolerance = TOLERANCE.get(self.model.dtype, HALF_TOLERANCE) * scale
        if all(
            math.isclose(one, other, rel_tol=0, abs_tol=tolerance) for one, other in zip(found, expected, strict=True)
        ):
            self.shares_prompts = True
            self.facts |= {"packing": "shared", "attention": attention_on(self.model.device, self.model.dtype)}
            if self._decoder is not None:
                self.facts["layers"] = "onednn"
            return
        if self._decoder is not None:  # it has modified the model, so load it again
            self._decoder = None
            self.model = self._load()
            return
        for each, name in before:
            each._attn_implementation = name

    def _probes(self) -> Iterator[Row]:
        size = int(self.model.get_input_embeddings().num_embeddings)
        generator = torch.Generator().manual_seed(0)
        longest = max(width + max(answers) for width, answers in PROBE)
        ids = torch.randint(0, size, (sum(width + sum(answers) for width, answers in PROBE),), generator=generator)
        numbers = iter(ids.tolist())
        for width, answers in PROBE:
            share = length_of(self.model, longest) / longest
            parts = [[next(numbers) for _ in range(max(1, int(share * length)))] for length in (width, *answers)]
            prompt, *responses = map(token_ids, parts)
            yield Row("", prompt, tuple(map(Response, responses)))

    @torch.inference_mode()
    def _shared(self, rows: Sequence[Row]) -> list[Numbers]:
        results: list[Numbers] = [[[] for _ in row.responses] for row in rows]
        for batch in row_batches(rows, self.budget, self.limit):
            beat()
            packed = pack([piece.row for piece in batch], "shared", self.model.device, attend_once=True)
            numbers = iter(self.packed_numbers(packed, self._states(packed)))
            for piece in batch:
                for place, response in enumerate(piece.row.responses, piece.first):
                    count = len(response.ids) if self.per_token else 1
                    results[piece.place][place] = [next(numbers) for _ in range(count)]
        return results

    def _states(self, packed: Packed) -> Any:
        """Last hidden states of a flat batch, as `packed_numbers` expects them."""
        if self._decoder is not None:
            return self._decoder(packed, only_last=self.only_last)
        states = Trained(self.model).hidden(packed)
        return states[packed.last] if self.only_last else states

    @torch.inference_mode()
    def _padded(self, rows: Sequence[Row]) -> list[Numbers]:
        results: list[Numbers] = [[[] for _ in row.responses] for row in rows]
        places = [(index, place) for index, row in enumerate(rows) for place in range(len(row.responses))]
        lengths = [len(rows[index].prompt) + len(rows[index].responses[place].ids) for index, place in places]
        for batch in batches(lengths, self.budget):
            beat()
            chosen = [(rows[index], rows[index].responses[place]) for index, place in map(places.__getitem__, batch)]
            sizes = [len(response.ids) for _, response in chosen]
            sequences = [[*row.prompt.tolist(), *response.ids.tolist()] for row, response in chosen]
            numbers = iter(self.padded_numbers(sequences, sizes))
            for which, size in zip(batch, sizes, strict=True):
                index, place = places[which]
                results[index][place] = [next(numbers) for _ in range(size if self.per_token else 1)]
        return results


def _flat(rows: Sequence[Numbers]) -> list[float]:
    return [number for row in rows for numbers in row for number in numbers]
