"""The forward pass of decoders on CPUs: transformers' own numbers, for every sequence alone."""

import numpy as np
import pytest
import torch
import transformers
from annotation_world import tiny_config

from modeling.cpu import CpuDecoder, has_fast_cpu_decoder
from modeling.heads import backbone_of
from modeling.packing import pack
from modeling.rows import Response, Row

SIZES = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3}
CASES = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-longer-context": ("LlamaConfig", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {}),
}  # fmt: skip


def model_of(family, **changes):
    """A classifier whose biases and norms are not those of a new model."""
    keys = {name: getattr(tiny_config(), name) for name in ("vocab_size", "intermediate_size", "initializer_range")}
    config = getattr(transformers, family)(**{**keys, **SIZES, "num_labels": 1, "pad_token_id": 0, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def rows_of(model, *sizes):
    rng = np.random.default_rng(0)
    known = model.config.vocab_size
    return [
        Row("", rng.integers(0, known, width), tuple(Response(rng.integers(0, known, count)) for count in answers))
        for width, answers in sizes
    ]


@pytest.mark.parametrize("case", CASES)
def test_states_are_those_of_each_sequence_alone(case):
    family, changes = CASES[case]
    model = model_of(family, **changes)
    rows = rows_of(model, (12, (5, 70, 1)), (1, (20,)), (17, (0, 3, 0, 66)), (30, (0,)))
    batch = pack(rows, "shared", attend_once=True)
    with torch.no_grad():
        alone = [
            backbone_of(model)(torch.from_numpy(np.concatenate([row.prompt, response.ids]))[None]).last_hidden_state[0]
            for row in rows
            for response in row.responses
        ]
    predicting = torch.cat(
        [states[len(row.prompt) - 1 : -1] for states, row in zip(alone, each_response(rows), strict=True)]
    )
    assert has_fast_cpu_decoder(model)
    decoder = CpuDecoder(model)
    with torch.inference_mode():
        every, last = decoder(batch, only_last=False), decoder(batch, only_last=True)
    torch.testing.assert_close(every[batch.positions], predicting, atol=1e-4, rtol=1e-4)
    for found in (every[batch.last], last):
        torch.testing.assert_close(found, torch.stack([states[-1] for states in alone]), atol=1e-4, rtol=1e-4)
    assert not [*backbone_of(model).layers]  # its weights are not in memory twice


def each_response(rows):
    return [row for row in rows for _ in row.responses]


@pytest.mark.parametrize(
    ("family", "changes"),
    [("Gemma2Config", {}), ("GPT2Config", {"n_head": 2, "n_embd": 32}), ("LlamaConfig", {"hidden_act": "gelu"})],
)
def test_other_models_keep_their_own_forward_pass(family, changes):
    assert not has_fast_cpu_decoder(model_of(family, **changes))


def test_so_do_half_precision_and_layers_that_are_no_plain_matrices():
    assert not has_fast_cpu_decoder(model_of("LlamaConfig").to(torch.bfloat16))
    model = model_of("LlamaConfig")
    assert has_fast_cpu_decoder(model)
    model.model.layers[1].mlp.up_proj = type("Adapted", (torch.nn.Linear,), {})(48, 64)
    assert not has_fast_cpu_decoder(model)
