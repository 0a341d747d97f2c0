"""Imports modules that every stage with a model needs, in the processes that stages are forked from
(contracts/warm.py)."""


def preload() -> None:
    """Import the modules that loading and running a model imports lazily, and the one architecture (Llama) that most
    others are built from."""
    import torch._dynamo  # noqa: F401
    import transformers.activations
    import transformers.core_model_loading
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama
    import transformers.models.llama.tokenization_llama  # noqa: F401
    from jinja2 import ext, sandbox  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")  # compiles the patterns of all architectures, which it keeps
