"""The scorer kind `process_reward`: runs a model that scores each step of an answer.

Two types of models are supported, and both are read after each step: token classifiers with two labels, the second of
which is "right" (Qwen2.5-Math-PRM, Zhang et al. 2025, arXiv 2501.07301; TRL's PRMTrainer), and language models, whose
next token is a label for right or wrong (Math-Shepherd, Wang et al. 2024, arXiv 2312.08935; RLHFlow's). A step's score
is the probability of right, normalized over the two labels.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from annotation.models.batching import by_rollout, chunks, prefetch, shared_row
from annotation.models.loading import pad_right
from annotation.models.reader import BATCHES, ModelReader
from annotation.models.steps import PolicyTokens, StepChat, StepInput, aggregate, divide, token_rewards
from annotation.models.tokens import run_backbone
from annotation.samples import Sample
from annotation.scorers.process_reward import UNPLACED_STEPS, UNREAD_STEPS, ProcessRewardConfig
from contracts.attempt import beat
from contracts.chat import ChatTokenizer
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.records import Score
from modeling.heads import logit_scaling
from modeling.loading import load_causal, load_token_classifier
from modeling.logprobs import scale_logits
from modeling.packing import Packed
from modeling.rows import Row


class _Prepared(NamedTuple):
    """The model's input for a sample, and the tokens that its steps' scores are assigned to."""

    sample: int
    """Index of the sample."""
    inputs: StepInput
    rewarded: list[int]
    """For each step, the index of the policy's token that ends it."""


class ProcessRewardModel(ModelReader):
    """Scores the steps of answers, in conversations built by the model's own chat template."""

    per_token: ClassVar[bool] = True

    def __init__(self, config: ProcessRewardConfig, longest: int | None) -> None:
        self.open_tokenizers(config)
        is_causal = config.loaded_as() == "causal"
        super().__init__(config, longest, load_causal if is_causal else load_token_classifier)
        self.labels: list[int] | None = None
        if is_causal:
            self.labels = list(self.steps.label_ids)
            self.scaling = logit_scaling(self.model)
        self.share_prompts()

    def open_tokenizers(self, config: ProcessRewardConfig) -> None:
        """Open the tokenizers of the model and of the policy.

        Raises:
            UserError: marker or labels are not single tokens of the model.
        """
        self.config = config
        self.steps = StepChat(config, config.date)
        self.policy = PolicyTokens(ChatTokenizer(config.tokenizer) if config.tokenizer else self.steps.chat)
        _ = self.steps.inserted_token

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample, with the scores of its steps.

        Reasons for which a sample is dropped: "too_long" if the conversation exceeds the limit, "empty" if there is no
        token that could be rewarded, "unread_steps", "unplaced_steps".
        """
        self.steps.chat.counts.clear()
        results: list[Score | str | Fault] = ["too_long"] * len(samples)
        read = 0
        for chunk in prefetch(chunks(self._rows(samples, results), lambda item: item[1].tokens, BATCHES * self.budget)):
            for (group, row), numbers in zip(chunk, self.read([row for _, row in chunk]), strict=True):
                for asked, own in zip(group, numbers, strict=True):
                    shared = len(row.prompt)
                    scores = [_sigmoid(own[place - shared]) for place in asked.inputs.places]
                    results[asked.sample] = self._scored(samples[asked.sample], scores, asked.rewarded)
                    read += len(scores)
        self.counts = {"steps": read, **self.steps.chat.counts}
        return results

    def _rows(self, samples: list[Sample], results: list[Score | str | Fault]) -> Iterator[tuple[list[_Prepared], Row]]:
        """The model's inputs for each prompt that fit the limit, as rows; the other samples get a reason or fault in
        `results`."""
        for indices in by_rollout(samples):
            group: list[_Prepared] = []
            for index in indices:
                beat()
                try:
                    found = self._prepare(index, samples[index])
                except UserError as error:
                    results[index] = Fault(error)
                    continue
                if isinstance(found, str):
                    results[index] = found
                else:
                    group.append(found)
            if group:
                # Positions whose outputs are read must be in the responses, not in the shared prompt.
                first = min(asked.inputs.places[0] for asked in group)
                yield group, shared_row([asked.inputs.ids for asked in group], most=first)

    def _prepare(self, index: int, sample: Sample) -> _Prepared | str:
        if not sample.completion.response_ids:
            return "empty"
        steps = divide(sample.completion.text, self.config.pattern)
        inputs = self.steps.inputs_of(sample, steps)
        if inputs is None:
            return UNREAD_STEPS
        if self.longest is not None and len(inputs.ids) > self.longest:
            return "too_long"
        rewarded = self.policy.last_tokens(sample, steps)
        return UNPLACED_STEPS if rewarded is None else _Prepared(index, inputs, rewarded)

    def _scored(self, sample: Sample, scores: list[float], rewarded: list[int]) -> Score:
        rewards = token_rewards(
            scores, rewarded, len(sample.completion.response_ids), differences=self.config.differences
        )
        return sample.scored(
            aggregate(scores, self.config.aggregate),
            parts={"steps": len(scores), "lowest": min(scores), "last": scores[-1]},
            extras={"step_scores": scores},
            token_rewards=rewards,
        )

    def packed_numbers(self, batch: Packed, hidden: Any) -> list[float]:
        """For each response token, the log-odds that a step which ends with it is right."""
        # The states at the tokens themselves: each is the state before the next token, or the last of its sequence.
        places = batch.positions.roll(-1)
        places[batch.lengths.cumsum(0) - 1] = batch.last
        return self._log_odds(hidden[places])

    def padded_numbers(self, sequences: list[list[int]], sizes: list[int]) -> list[float]:
        """For each response token of a padded batch, the log-odds that a step which ends with it is right."""
        input_ids_BT, mask_BT = pad_right(sequences, 0, self.model.device)
        _, outputs = run_backbone(self.model, input_ids_BT, mask_BT)
        states = [
            outputs.last_hidden_state[line, len(sequence) - size : len(sequence)]
            for line, (sequence, size) in enumerate(zip(sequences, sizes, strict=True))
        ]
        return self._log_odds(torch.cat(states))

    def _log_odds(self, states: Any) -> list[float]:
        if self.labels is None:
            logits_N2 = self.model.score(states).float()
        else:  # only the two labels' rows of the LM head are needed
            head = self.model.get_output_embeddings()
            bias = getattr(head, "bias", None)
            linear = nn.functional.linear(states, head.weight[self.labels], None if bias is None else bias[self.labels])
            logits_N2 = scale_logits(linear.float(), self.scaling)
        odds: list[float] = (logits_N2[:, 1] - logits_N2[:, 0]).tolist()
        return odds


def own_log_odds(labels: tuple[int, int], model: Any, sequences: list[list[int]]) -> list[float]:
    """The log-odds of the second label against the first at each token of each sequence, from the model's own forward
    pass."""
    found: list[float] = []
    for ids in sequences:
        logits_TV = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float()
        found += (logits_TV[:, labels[1]] - logits_TV[:, labels[0]]).tolist()
    return found


def _sigmoid(number: float) -> float:
    return 0.5 * (1 + math.tanh(number / 2))
