"""What the stages of this package import, for the process that they are forked from (contracts/warm.py)."""


def preload() -> None:
    """Import it."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401

    import annotation.logprobs
    import annotation.reward_model
    import annotation.scoring
    import annotation.values  # noqa: F401
