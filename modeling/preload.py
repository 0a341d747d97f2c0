"""What every stage with a model imports, for the processes that stages are forked from (contracts/warm.py)."""


def preload() -> None:
    """Import what loading and running a model imports only when it happens; of the architectures, the one whose
    modules most others are built from."""
    import torch._dynamo  # noqa: F401
    import transformers.activations
    import transformers.core_model_loading
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama
    import transformers.models.llama.tokenization_llama  # noqa: F401
    from jinja2 import ext, sandbox  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401
