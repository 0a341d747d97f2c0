"""The scorer kind `reward_model`: runs a Bradley-Terry model, which is read at the last token of the conversation."""

from collections.abc import Iterator
from typing import Any, ClassVar

from annotation.models.batching import by_rollout, chunks, prefetch, shared_row
from annotation.models.loading import pad_right
from annotation.models.reader import BATCHES, ModelReader
from annotation.samples import Sample
from annotation.scorers.reward_model import RewardModelConfig
from contracts.attempt import beat
from contracts.chat import ChatTokenizer
from contracts.conversations import with_answer
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.records import Score
from modeling.loading import load_classifier
from modeling.packing import Packed
from modeling.rows import Row


class RewardModel(ModelReader):
    """Scores conversations built by the reward model's own chat template."""

    only_last: ClassVar[bool] = True

    def __init__(self, config: RewardModelConfig, longest: int | None) -> None:
        assert config.model is not None
        self.chat = ChatTokenizer(config.model, config.chat_template_kwargs, config.date)
        super().__init__(config, longest, load_classifier)
        if hasattr(self.model, "score"):
            self.share_prompts()

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample; "too_long" if the conversation exceeds the limit."""
        self.chat.counts.clear()
        results: list[Score | str | Fault] = ["too_long"] * len(samples)
        conversations = self._conversations(samples, results)
        for chunk in prefetch(chunks(conversations, lambda item: item[1].tokens, BATCHES * self.budget)):
            rewards = self.read([row for _, row in chunk])
            for (indices, _), numbers in zip(chunk, rewards, strict=True):
                for index, (reward,) in zip(indices, numbers, strict=True):
                    results[index] = samples[index].scored(reward)
        self.counts = dict(self.chat.counts)
        return results

    def _conversations(
        self, samples: list[Sample], results: list[Score | str | Fault]
    ) -> Iterator[tuple[list[int], Row]]:
        """For each prompt, the indices of the samples that fit the limit, and their conversations as a row; faults go
        to `results`."""
        for indices in by_rollout(samples):
            fitting: dict[int, list[int]] = {}
            for index in indices:
                beat()
                try:
                    ids = self._token_ids(samples[index])
                except UserError as error:
                    results[index] = Fault(error)
                    continue
                if self.longest is None or len(ids) <= self.longest:
                    fitting[index] = ids
            if fitting:
                yield list(fitting), shared_row(list(fitting.values()))

    def _token_ids(self, sample: Sample) -> list[int]:
        rollout = sample.rollout
        try:
            return self.chat.conversation(with_answer(rollout.messages, sample.completion.text), tools=rollout.tools)
        except UserError as error:
            raise UserError(f"{sample}: {error}") from error

    def packed_numbers(self, batch: Packed, hidden: Any) -> list[float]:
        """Rewards: the classification head's output at the last token of each sequence."""
        rewards: list[float] = self.model.score(hidden)[:, 0].float().tolist()
        return rewards

    def padded_numbers(self, sequences: list[list[int]], sizes: list[int]) -> list[float]:
        """Rewards from the model's own forward pass (`own_rewards`)."""
        return own_rewards(self.model, sequences)


def own_rewards(model: Any, sequences: list[list[int]]) -> list[float]:
    """Rewards of whole sequences, computed by transformers' own forward pass.

    The classification heads of transformers read the right-most token that differs from `pad_token_id`. If the padding
    token is the end-of-turn token, that is the second to last token. Setting `pad_token_id` to a token that ends none
    of these sequences makes it the last real token, regardless of the tokenizer's padding token.
    """
    last = {sequence[-1] for sequence in sequences}
    pad = next(token for token in range(len(last) + 1) if token not in last)
    model.config.get_text_config().pad_token_id = pad
    input_ids_BT, mask_BT = pad_right(sequences, pad, model.device)
    rewards_B1 = model(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False).logits
    rewards: list[float] = rewards_B1[:, 0].float().tolist()
    return rewards
