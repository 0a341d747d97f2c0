"""The scorer kind `reward_model`: a Bradley-Terry model, read at the last token of the conversation."""

import torch

from annotation.batching import batches
from annotation.config import ScoreConfig
from annotation.loading import compute_facts, load_model, pad_right
from annotation.samples import Sample
from contracts.attempt import beat
from contracts.chat import ChatTokenizer
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.records import Message, Score
from modeling.loading import load_classifier


class RewardModel:
    """Scores conversations built by the reward model's own chat template."""

    def __init__(self, config: ScoreConfig, longest: int | None) -> None:
        assert config.model is not None
        self.budget = config.batch_tokens
        self.longest = longest
        self.chat = ChatTokenizer(config.model, config.chat_template_kwargs, config.date)
        self.model = load_model(config, load_classifier)
        self.facts = compute_facts(self.model)
        self.counts: dict[str, int] = {}

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample; "too_long" where the conversation exceeds the limit."""
        self.chat.counts.clear()
        results: list[Score | str | Fault] = ["too_long"] * len(samples)
        fitting: dict[int, list[int]] = {}
        for index, sample in enumerate(samples):
            beat()
            try:
                ids = self._token_ids(sample)
            except UserError as error:
                results[index] = Fault(error)
                continue
            if self.longest is None or len(ids) <= self.longest:
                fitting[index] = ids
        order = list(fitting)
        for batch in batches([len(ids) for ids in fitting.values()], self.budget):
            beat()
            indices = [order[position] for position in batch]
            rewards = self._forward([fitting[index] for index in indices])
            for index, reward in zip(indices, rewards, strict=True):
                results[index] = samples[index].scored(reward)
        self.counts = dict(self.chat.counts)
        return results

    def _token_ids(self, sample: Sample) -> list[int]:
        answer = Message("assistant", sample.completion.text)
        try:
            return self.chat.conversation([*sample.rollout.messages, answer], tools=sample.rollout.tools)
        except UserError as error:
            raise UserError(f"{sample}: {error}") from error

    @torch.inference_mode()
    def _forward(self, sequences: list[list[int]]) -> list[float]:
        """Rewards of one batch.

        The classification heads of transformers read the right-most token that differs from `pad_token_id`. Where the
        padding is the end-of-turn token, that is the last token but one. Padding with a token that ends none of these
        sequences, and saying so, makes it the last real token, whatever the tokenizer's padding is.
        """
        last = {sequence[-1] for sequence in sequences}
        pad = next(token for token in range(len(last) + 1) if token not in last)
        self.model.config.get_text_config().pad_token_id = pad
        input_ids_BT, mask_BT = pad_right(sequences, pad, self.model.device)
        rewards_B1 = self.model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False).logits
        rewards: list[float] = rewards_B1[:, 0].float().tolist()
        return rewards
