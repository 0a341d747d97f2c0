"""Imports what preflight needs."""

from collections.abc import Sequence


def preload(libraries: Sequence[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401

    import modeling.inspect
    import modeling.loading  # noqa: F401
