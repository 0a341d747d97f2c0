"""The scorer kind `values`: runs a critic, which predicts the return of each state in which the policy chose a token.

A critic is a sequence classifier with one label, like a reward model, except that its linear head `score` is applied at
every position instead of the last one. The value of response token t is score(h), with h the last hidden state at
position t - 1 of prompt and response together: the state in which the token was chosen, which does not contain the
token. So the first value is that of the prompt; it is the sample's score. A policy that is its own critic stores such a
head next to its weights.
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

    def to_score(self, sample: Sample, numbers: list[float]) -> Score | str:
        """The value of the prompt, with the values of all response tokens; "empty" if there are none."""
        return sample.scored(numbers[0], token_values=tuple(numbers)) if numbers else "empty"

    def packed_tokens(self, states: Any, targets: Any) -> list[float]:
        """Value of the state before each response token."""
        values: list[float] = (states.float() @ self.head.T)[:, 0].tolist()
        return values

    def numbers(self, batch: Batch) -> list[float]:
        """Value of the state before each response token of a padded batch."""
        _, _, hidden_NH = self.run_backbone(batch)
        return self.packed_tokens(hidden_NH, batch.targets)
