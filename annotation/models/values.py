"""The scorer kind `values`: what a critic expects of each state that the policy chose a token in.

A critic is a sequence classifier with one label, as reward models are, and its linear head `score` reads every position
instead of the last one. The value of response token t is score(h), h being the last hidden state at position t - 1 of
prompt and response together: the state in which the token was chosen, which the token itself is no part of. So the
first value belongs to the prompt alone. It is the sample's score. A policy that is its own critic has such a head
beside its weights.
"""

from typing import Any

from safetensors.torch import load_file

from annotation.models.tokens import Batch, TokenScorer
from annotation.samples import Sample
from annotation.scorers.values import ValueConfig
from contracts.errors import UserError
from contracts.models import VALUE_HEAD
from contracts.records import Score
from modeling.loading import load_causal, load_classifier


class ValueModel(TokenScorer):
    """One value per response token; a sample's score is the first one, the value of its prompt."""

    def __init__(self, config: ValueConfig, longest: int | None) -> None:
        assert config.model is not None
        own = config.model / VALUE_HEAD
        super().__init__(config, longest, load_causal if own.is_file() else load_classifier)
        if own.is_file():
            self.head = load_file(own)["weight"].to(self.model.device)
        elif not hasattr(self.model, "score"):
            raise UserError(
                f"critic {self.path}: {type(self.model).__name__} has no linear layer `score` as its head. Choose a "
                "model of another architecture, such as Llama or Qwen."
            )
        else:
            self.head = self.model.score.weight.float()
        self.share_prompts()

    def judge(self, sample: Sample, numbers: list[float]) -> Score | str:
        """The value of the prompt, with those of all tokens; "empty" where there are none."""
        return sample.scored(numbers[0], token_values=tuple(numbers)) if numbers else "empty"

    def packed_tokens(self, states: Any, targets: Any) -> list[float]:
        """Value of the state before each response token."""
        values: list[float] = (states.float() @ self.head.T)[:, 0].tolist()
        return values

    def numbers(self, batch: Batch) -> list[float]:
        """The same."""
        _, _, hidden_NH = self.run_backbone(batch)
        return self.packed_tokens(hidden_NH, batch.targets)
