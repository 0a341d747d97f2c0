"""The scorer kind `pairwise`: a causal language model that says which of two answers to a prompt is better.

contracts/pairwise.py says how it is asked. An answer's score is its probability to be better than another one, in
[0, 1], averaged over the answers that it is compared with. Both orders of every two answers are asked, and averaged,
so that a liking of the model for the first or the second place cancels.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from annotation.batching import batches
from annotation.config import ScoreConfig
from annotation.loading import compute_facts, load_model, pad_right
from annotation.samples import Sample
from annotation.tokens import head_logits, run_backbone
from contracts.artifacts import Artifact
from contracts.attempt import beat
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.pairwise import PairwiseChat
from contracts.records import ROLLOUTS, Rollout, Score
from modeling.loading import load_causal

Contest = tuple[str, str, str]
"""A prompt's id and two different answers to it, in alphabetical order: whoever asks, it is computed once."""
Result = float | str | Fault
"""The probability that the first answer is better, or why nobody knows."""


class PairwiseModel:
    """Compares the answers to a prompt with each other, or with those of other rollouts (`against`)."""

    def __init__(self, config: ScoreConfig, longest: int | None) -> None:
        assert config.model is not None
        self.budget = config.batch_tokens
        self.longest = longest
        self.opponents = config.opponents
        self.against = None if config.against is None else _answers(config.against)
        self.chat = PairwiseChat(config.model, config.chat_template_kwargs, config.date)
        self.labels = list(self.chat.label_ids)
        self.model = load_model(config, load_causal)
        self.facts = compute_facts(self.model)
        self.counts: dict[str, int] = {}

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample.

        Reasons for which a sample is dropped: "too_long" where no comparison fits the limit (where some do, its score
        is their mean), "no_opponent" where its prompt has no other answer. A comparison that fails, fails for both.
        """
        self.chat.chat.counts.clear()
        rivals = list(self._rivals(samples))
        wanted: dict[Contest, Rollout] = {}
        for sample, others in zip(samples, rivals, strict=True):
            for other in others:
                if other != sample.completion.text:
                    wanted.setdefault(_contest(sample, other), sample.rollout)
        results = self._compare(wanted)
        return [_score(sample, others, results) for sample, others in zip(samples, rivals, strict=True)]

    def _rivals(self, samples: list[Sample]) -> Iterator[list[str]]:
        """The answers that each sample is compared with.

        With fewer opponents than there are, its nearest neighbours in the ring of the prompt's answers: that of two
        answers each is mostly the other's opponent halves the comparisons.
        """
        if self.against is not None:
            for sample in samples:
                yield self.against.get(sample.rollout.prompt_id, [])[: self.opponents]
            return
        rings: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            rings.setdefault(sample.rollout.prompt_id, []).append(index)
        for index, sample in enumerate(samples):
            ring = rings[sample.rollout.prompt_id]
            place, size = ring.index(index), len(ring)
            steps = [step for distance in range(1, size // 2 + 1) for step in (distance, -distance)][: size - 1]
            yield [samples[ring[(place + step) % size]].completion.text for step in steps[: self.opponents]]

    def _compare(self, wanted: dict[Contest, Rollout]) -> dict[Contest, Result]:
        """The result of every contest."""
        results: dict[Contest, Result] = {}
        sequences: list[NDArray[np.int32]] = []
        fitting: list[Contest] = []
        for contest, rollout in wanted.items():
            beat()
            try:
                both = self._token_ids(rollout, contest)
            except UserError as error:
                results[contest] = Fault(error)
                continue
            if self.longest is not None and max(map(len, both)) > self.longest:
                results[contest] = "too_long"
            else:
                fitting.append(contest)
                sequences += both
        preferences = np.zeros(len(sequences))
        for batch in batches([len(ids) for ids in sequences], self.budget):
            beat()
            preferences[batch] = self._forward([sequences[index].tolist() for index in batch])
        forwards, backwards = preferences[::2], preferences[1::2]
        chances = (_sigmoid(forwards) + _sigmoid(-backwards)) / 2
        results |= zip(fitting, chances.tolist(), strict=True)
        self.counts = {
            "comparisons": len(fitting),
            "consistent": int((forwards * backwards < 0).sum()),
            "too_long_comparisons": sum(result == "too_long" for result in results.values()),
            **self.chat.chat.counts,
        }
        return results

    def _token_ids(self, rollout: Rollout, contest: Contest) -> list[NDArray[np.int32]]:
        """The question in both orders."""
        _, first, second = contest
        what = f"two answers to prompt {rollout.prompt_id}"
        orders = ((first, second), (second, first))
        return [
            np.array(self.chat.token_ids(rollout.messages, *order, what=what, tools=rollout.tools), np.int32)
            for order in orders
        ]

    @torch.inference_mode()
    def _forward(self, sequences: list[list[int]]) -> list[float]:
        """log p(A) - log p(B) of the token that follows each sequence."""
        input_ids_BT, mask_BT = pad_right(sequences, 0, self.model.device)
        backbone, outputs = run_backbone(self.model, input_ids_BT, mask_BT)
        rows_B = torch.arange(len(sequences), device=mask_BT.device)
        last_BH = outputs.last_hidden_state[rows_B, mask_BT.sum(1) - 1]
        logits_B2 = head_logits(self.model, backbone, outputs, last_BH)[:, self.labels].float()
        differences: list[float] = (logits_B2[:, 0] - logits_B2[:, 1]).tolist()
        return differences


def _answers(path: Path) -> dict[str, list[str]]:
    """The answers in published rollouts, by their prompts."""
    rows = Artifact.open(path, ROLLOUTS).rows(Rollout)
    return {row.prompt_id: [completion.text for completion in row.completions] for row in rows}


def _contest(sample: Sample, other: str) -> Contest:
    first, second = sorted((sample.completion.text, other))
    return sample.rollout.prompt_id, first, second


def _score(sample: Sample, others: Sequence[str], results: dict[Contest, Result]) -> Score | str | Fault:
    """A sample's mean chance; identical answers tie."""
    chances: list[float] = []
    for other in others:
        contest = _contest(sample, other)
        result = 0.5 if other == sample.completion.text else results[contest]
        if isinstance(result, Fault):
            return result
        if not isinstance(result, str):
            chances.append(result if contest[1] == sample.completion.text else 1 - result)
    if not chances:
        return "too_long" if others else "no_opponent"
    return sample.scored(sum(chances) / len(chances))


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(values / 2))
