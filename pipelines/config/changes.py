"""What may change from one iteration to the next, and how a change is laid over what was set before."""

from typing import Any

from contracts.errors import UserError
from training.config import PolicySettings

DEFAULT_ALGORITHM = PolicySettings.model_fields["algorithm"].default
CHANGEABLE = frozenset(
    "accumulate critic ema_decay evaluation experience generation pairs prompts reference scorers seed start "
    "training".split()
)
"""Keys of a run whose value may change from one iteration to the next."""


def require_changeable(change: dict[str, Any], iteration: int) -> None:
    """Raise UserError unless these keys may change from `iteration` on."""
    fixed = {name for name in change if name not in CHANGEABLE}
    prompts = change.get("prompts", {})
    fixed |= {f"prompts.{name}" for name in prompts if name != "per_iteration"} if isinstance(prompts, dict) else set()
    critic = change.get("critic")
    fixed |= {"critic.start"} if isinstance(critic, dict) and "start" in critic else set()
    if iteration < 1 or fixed:
        named = f"{min(fixed)} cannot change" if fixed else "nothing can change before iteration 1"
        raise UserError(
            f"changes.{iteration}: {named} within a run. What can: {', '.join(sorted(CHANGEABLE))}, of prompts only "
            "prompts.per_iteration, from iteration 1 on. For anything else start a new run with another name."
        )


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `change`, section by section; another algorithm comes without the settings before."""
    merged = dict(base)
    if "algorithm" in change and change["algorithm"] != base.get("algorithm", DEFAULT_ALGORITHM):
        merged.pop("settings", None)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
