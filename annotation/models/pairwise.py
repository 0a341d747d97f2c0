"""The scorer kind `pairwise`: runs a causal language model that says which of two answers to a prompt is better.

contracts/pairwise.py defines the model's input, annotation/models/comparisons.py how results become scores.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from annotation.models.batching import chunks, prefetch, shared_row
from annotation.models.comparisons import Comparison, Opponents, Result, all_comparisons, score_of
from annotation.models.loading import pad_right
from annotation.models.reader import BATCHES, ModelReader
from annotation.models.tokens import head_logits, run_backbone
from annotation.samples import Sample, prompt_in_words
from annotation.scorers.pairwise import PairwiseConfig
from contracts.attempt import beat
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.pairwise import PairwiseChat
from contracts.records import Rollout, Score
from modeling.loading import load_causal
from modeling.packing import Packed, tokens_of
from modeling.rows import Row


class PairwiseModel(ModelReader):
    """Compares the answers to a prompt with each other, or with those of other rollouts (`against`)."""

    only_last: ClassVar[bool] = True

    def __init__(self, config: PairwiseConfig, longest: int | None) -> None:
        assert config.model is not None
        self.opponents = Opponents(config.opponents, config.against)
        self.chat = PairwiseChat(config.model, config.chat_template_kwargs, config.date)
        self.labels = list(self.chat.label_ids)
        super().__init__(config, longest, load_causal)
        self.share_prompts_before_head()

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample.

        Reasons for which a sample is dropped: "too_long" if none of its comparisons fits the limit (if some do, its
        score is their mean), "no_opponent" if its prompt has no other answer. A comparison that fails makes both of its
        samples fail.
        """
        self.chat.chat.counts.clear()
        opponents = self.opponents.of(samples)
        results = self._compare(
            {comparison: sample.rollout for comparison, sample in all_comparisons(samples, opponents).items()}
        )
        return [score_of(sample, others, results) for sample, others in zip(samples, opponents, strict=True)]

    def _compare(self, rollouts: dict[Comparison, Rollout]) -> dict[Comparison, Result]:
        """The result of every comparison."""
        results: dict[Comparison, Result] = {}
        preferences: dict[Comparison, list[float]] = {}
        for chunk in prefetch(chunks(self._rows(rollouts, results), _tokens, BATCHES * self.budget)):
            numbers = self.read([row for _, row in chunk])
            for (inputs, _), found in zip(chunk, numbers, strict=True):
                for (comparison, place), (number,) in zip(inputs, found, strict=True):
                    preferences.setdefault(comparison, [0.0, 0.0])[place] = number
        forwards, backwards = np.array([*preferences.values()]).reshape(-1, 2).T
        chances = (_sigmoid(forwards) + _sigmoid(-backwards)) / 2
        results |= zip(preferences, chances.tolist(), strict=True)
        self.counts = {
            "comparisons": len(preferences),
            "consistent": int((forwards * backwards < 0).sum()),
            "too_long_comparisons": sum(result == "too_long" for result in results.values()),
            **self.chat.chat.counts,
        }
        return results

    def _rows(
        self, rollouts: dict[Comparison, Rollout], results: dict[Comparison, Result]
    ) -> Iterator[tuple[list[tuple[Comparison, int]], Row]]:
        """The model's inputs for each prompt as rows, each input with its comparison and order (0 or 1); comparisons
        without valid inputs get a reason or fault in `results`."""
        for _, comparisons in groupby(rollouts, key=lambda comparison: comparison[0]):
            inputs: dict[tuple[Comparison, int], list[int]] = {}
            for comparison in comparisons:
                beat()
                try:
                    both = self._token_ids(rollouts[comparison], comparison)
                except UserError as error:
                    results[comparison] = Fault(error)
                    continue
                if self.longest is not None and max(map(len, both)) > self.longest:
                    results[comparison] = "too_long"
                else:
                    inputs |= {(comparison, place): ids for place, ids in enumerate(both)}
            yield from _shared_rows(inputs)

    def _token_ids(self, rollout: Rollout, comparison: Comparison) -> list[list[int]]:
        """The model's input for a comparison, in both orders."""
        _, first, second = comparison
        what = f"two answers to {prompt_in_words(rollout)}"
        return [
            self.chat.token_ids(rollout.messages, *order, what=what, tools=rollout.tools)
            for order in ((first, second), (second, first))
        ]

    def packed_numbers(self, batch: Packed, hidden: Any) -> list[float]:
        """log p(A) - log p(B) for the token that follows each sequence of a flat batch."""
        return self._differences(self.head.logits(hidden))

    def padded_numbers(self, sequences: list[list[int]], sizes: list[int]) -> list[float]:
        """log p(A) - log p(B) for the token that follows each sequence of a padded batch."""
        input_ids_BT, mask_BT = pad_right(sequences, 0, self.model.device)
        backbone, outputs = run_backbone(self.model, input_ids_BT, mask_BT)
        rows_B = torch.arange(len(sequences), device=mask_BT.device)
        last_BH = outputs.last_hidden_state[rows_B, mask_BT.sum(1) - 1]
        return self._differences(head_logits(self.model, backbone, outputs, last_BH))

    def _differences(self, logits_BV: Any) -> list[float]:
        logits_B2 = logits_BV[:, self.labels].float()
        differences: list[float] = (logits_B2[:, 0] - logits_B2[:, 1]).tolist()
        return differences


def _shared_rows(inputs: dict[tuple[Comparison, int], list[int]]) -> list[tuple[list[tuple[Comparison, int]], Row]]:
    """The inputs of one prompt as rows: all in one row, or one row per answer in the first position, whichever takes
    fewer tokens."""
    if not inputs:
        return []
    by_first: dict[str, list[tuple[Comparison, int]]] = {}
    for key in inputs:
        comparison, place = key
        by_first.setdefault(comparison[1 + place], []).append(key)
    ways = ([[*inputs]], [*by_first.values()])
    rows = [[(group, shared_row([inputs[key] for key in group])) for group in way] for way in ways]
    return min(rows, key=lambda way: sum(tokens_of(row, "shared") for _, row in way))


def _tokens(entry: tuple[list[tuple[Comparison, int]], Row]) -> int:
    return entry[1].tokens


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(values / 2))
