"""What the transformers of this environment computes by its defaults is not always what the others' computes."""

from pathlib import Path

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from modeling.loading import load_causal


def test_soft_caps_on_attention_count(tmp_path: Path) -> None:
    """The default attention of some versions leaves them away: the logits must be those of the eager one."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.5, attn_logit_softcapping=2.0,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    ids = torch.arange(3, 23)[None]
    eager = Gemma2ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        capped = eager(ids).logits
        torch.testing.assert_close(load_causal(tmp_path, torch.float32).eval()(ids).logits, capped)
        for layer in eager.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert float((eager(ids).logits - capped).abs().max()) > 1e-3
