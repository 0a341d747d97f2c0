"""The scorer kind `values`: a critic's value of the state before each response token."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from annotation.scorers.base import ModelScoreConfig, ModelSettings
from annotation.scorers.vocabulary import shared_vocabulary
from contracts.artifacts import Artifact
from contracts.config import identity
from contracts.models import ModelInfo

if TYPE_CHECKING:
    from modeling.loading import LoadedAs


def _require_values(model: ModelInfo) -> None:
    if not model.has_value_head:
        model.require_one_label()


class ValueSettings(ModelSettings):
    """Settings of a scorer that reads a critic's values."""

    kind: Literal["values"] = identity()
    """A critic's value of the state before each response token."""

    reader: ClassVar[str] = "annotation.models.values:ValueModel"
    checks: ClassVar[tuple[Callable[[ModelInfo], None], ...]] = (_require_values,)
    reads_tokens: ClassVar[bool] = True

    def loaded_as(self) -> "LoadedAs":
        """The class of model to load: a classifier, unless it is a policy with a separate value head."""
        assert self.model is not None
        return "causal" if ModelInfo.read(self.model).has_value_head else "classifier"

    def facts_of(self, rollouts: Artifact) -> dict[str, str]:
        """The vocabulary, which the critic must share with the policy."""
        assert self.model is not None
        return shared_vocabulary(self.model, rollouts, required=True)


class ValueConfig(ValueSettings, ModelScoreConfig):
    """Compute a critic's value of every state."""
