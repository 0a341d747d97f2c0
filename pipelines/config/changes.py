"""Merges the config changes that apply from an iteration on, and checks which keys may change."""

from typing import Any

from annotation.pairing.config import PairsSettings
from contracts.errors import UserError
from training.config import PolicySettings

SETTINGS_OWNERS = {
    "algorithm": PolicySettings.model_fields["algorithm"].default,
    "strategy": PairsSettings.model_fields["strategy"].default,
}
"""Keys that determine what the `settings` next to them belong to, with their defaults."""
CHANGEABLE = frozenset(
    "accumulate critic ema_decay evaluation experience generation lag pairs prompts reference replay scorers seed "
    "start training".split()
)
"""Keys of a run's config that may change from one iteration to the next."""


def require_changeable(change: dict[str, Any], iteration: int, place: str | None = None) -> None:
    """Raise UserError unless the keys of `change`, written at `place` in the config, may change from `iteration` on."""
    fixed = {name for name in change if name not in CHANGEABLE}
    prompts = change.get("prompts", {})
    fixed |= {f"prompts.{name}" for name in prompts if name != "per_iteration"} if isinstance(prompts, dict) else set()
    critic = change.get("critic")
    fixed |= {"critic.start"} if isinstance(critic, dict) and "start" in critic else set()
    if iteration < 1 or fixed:
        place = place or f"changes.{iteration}"
        named = f"{min(fixed)} cannot change" if fixed else "nothing can change before iteration 1"
        raise UserError(
            f"{place}: {named} within a run. What can: {', '.join(sorted(CHANGEABLE))}, of prompts only "
            "prompts.per_iteration, from iteration 1 on. For anything else start a new run with another name."
        )


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Merge `change` into `base`, section by section. Settings are dropped if the algorithm (or pair strategy) changes,
    and all keys of a scorer if its kind does."""
    merged = dict(base)
    if any(key in change and change[key] != base.get(key, default) for key, default in SETTINGS_OWNERS.items()):
        merged.pop("settings", None)
    for key, value in change.items():
        old = merged.get(key)
        if not isinstance(old, dict) or not isinstance(value, dict):
            merged[key] = value
        elif key == "scorers":
            merged[key] = {**old, **{name: _merge_scorer(old.get(name), one) for name, one in value.items()}}
        else:
            merged[key] = merge(old, value)
    return merged


def _merge_scorer(base: Any, change: Any) -> Any:
    """Merge a scorer's section; if its kind changes or was not set before, the old keys are dropped."""
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    return change if "kind" in change and change["kind"] != base.get("kind") else merge(base, change)
