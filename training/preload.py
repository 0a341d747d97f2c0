"""What the stages of this package import, for the process that they are forked from (contracts/warm.py)."""


def preload() -> None:
    """Import it."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401

    import training.critic
    import training.policy
    import training.reward
    import training.sft  # noqa: F401
    from training.engines import accelerated  # noqa: F401
