"""Registry of the scorer kinds, one module each: `SETTINGS` and `CONFIGS` map a kind's name to its classes."""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union, get_args

from pydantic import Field

from annotation.scorers.base import ScoreConfig, ScorerSettings
from contracts.config import validate

SETTINGS: dict[str, type[ScorerSettings]] = {}
"""Settings classes for a run's section `scorers`, by kind."""
CONFIGS: dict[str, type[ScoreConfig]] = {}
"""Config classes of the score stage, by kind."""


def _register() -> None:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, ScorerSettings):
                for kind in get_args(value.model_fields["kind"].annotation):
                    if issubclass(value, ScoreConfig):
                        CONFIGS[kind] = value
                    else:
                        SETTINGS[kind] = value


_register()

if TYPE_CHECKING:
    AnyScorer: TypeAlias = ScorerSettings
else:
    AnyScorer = Annotated[Union[tuple(SETTINGS.values())], Field(discriminator="kind")]  # noqa: UP007


def score_config(**fields: Any) -> ScoreConfig:
    """The score stage's config, of the kind given in `fields`.

    Raises:
        UserError: a field is invalid.
    """
    return validate(ScoreConfig, fields, "score")
