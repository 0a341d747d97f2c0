"""Chooses the packing of a training by its model's config.json alone."""

from collections.abc import Mapping
from typing import Any, Literal

from contracts.architectures import support_of
from contracts.errors import UserError
from training.config import TrainingConfig


def packing_of(config: TrainingConfig, settings: Mapping[str, Any]) -> Literal["shared", "flat", "padded"]:
    """The packing of a training's batches.

    Args:
        config: the training.
        settings: the model's config.json.

    Raises:
        UserError: the config asks for flat batches, which this model cannot compute, or the model cannot be trained.
    """
    flat = support_of(settings) == "flat"
    if config.packing == "padded" or (config.packing == "auto" and not flat):
        return "padded"
    if not flat:
        raise UserError(
            f"packing={config.packing}: models of type {settings.get('model_type')} are not known to compute flat "
            "batches right, because their layers have an attention of their own, or none. Use packing=auto or "
            "packing=padded."
        )
    return "shared" if config.packing == "auto" else config.packing
