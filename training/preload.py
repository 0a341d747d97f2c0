"""Imports the training stages' libraries in the process that the stages are forked from (contracts/warm.py)."""

from collections.abc import Sequence


def preload(libraries: Sequence[str]) -> None:
    """Import the modules of all training stages, regardless of `libraries`."""
    from modeling.preload import preload as preload_modeling

    preload_modeling()

    import training.critic
    import training.policy
    import training.reward
    import training.sft  # noqa: F401
    from training.engines import accelerated  # noqa: F401
