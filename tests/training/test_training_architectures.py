"""Every architecture of the table: engine = annotation = trainer = transformers, in every packing that it gets."""

import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, run_here
from safetensors.torch import load_file
from tiny_models import VOCABULARY, tiny_config, tiny_model
from torch import Tensor

from annotation.models.loading import pad_right
from annotation.models.tokens import head_logits, run_backbone
from contracts.architectures import CONDITIONAL, FLAT, PADDED, RECURRENT, REFUSED, require_supported, support_of
from contracts.errors import UserError
from contracts.fingerprint import PROCESSOR_FILES
from contracts.models import ModelInfo
from contracts.records import Sampling
from generation import transformers_engine
from generation.engine import GenerationRequest
from modeling.attention import use_packed_attention
from modeling.loading import load_causal, make_independent, read_config
from modeling.modules import TokenLogprobs
from modeling.packing import pack
from modeling.probe import check_architecture, require_independence
from modeling.rope import fix_rope
from modeling.rows import Response, Row, token_ids

KNOWN = sorted(FLAT | PADDED | RECURRENT)
TOLERANCE = 1e-4
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0],
    "original_max_position_embeddings": 16,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon with ALiBi": ("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": True}),
    "gemma3 without caps": ("gemma3_text", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "longrope in PhiMoE": (
        "phimoe",
        {"rope_parameters": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}},
    ),
    "dynamic NTK": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "YaRN": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
    ),
}  # fmt: skip


def rows() -> list[Row]:
    """Short and long ones, on both sides of every window and limit; shared prompts; one token and many."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> Any:
        return token_ids(rng.integers(3, VOCABULARY - 4, count))

    return [
        Row("a", ids(3), (Response(ids(2)), Response(ids(14)))),
        Row("b", ids(17), (Response(ids(8)), Response(ids(20)), Response(ids(1)))),
        Row("c", ids(1), (Response(ids(5)),)),
    ]


def sequences(batch: list[Row]) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of every sequence."""
    return [(row.prompt.tolist(), response.ids.tolist()) for row in batch for response in row.responses]


def alone(model: Any, batch: list[Row]) -> Tensor:
    """What transformers' own forward pass says of each sequence alone."""
    parts = []
    for prompt, answer in sequences(batch):
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        parts.append(logits.float().log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).squeeze(-1))
    return torch.cat(parts)


def scored(model: Any, batch: list[Row]) -> Tensor:
    """What annotation computes, all sequences in one batch."""
    pairs = sequences(batch)
    backbone, outputs = run_backbone(model, *pad_right([prompt + answer for prompt, answer in pairs], 0, "cpu"))
    states = [
        outputs.last_hidden_state[line, len(prompt) - 1 : len(prompt) + len(answer) - 1]
        for line, (prompt, answer) in enumerate(pairs)
    ]
    logprobs = head_logits(model, backbone, outputs, torch.cat(states)).float().log_softmax(-1)
    return logprobs.gather(-1, torch.tensor([token for _, answer in pairs for token in answer])[:, None]).squeeze(-1)


def sampled(model: Any, batch: list[Row]) -> Tensor:
    """What the engine reports of these answers, if it happens to sample them, all of them side by side."""
    pairs = sequences(batch)
    longest = max(len(answer) for _, answer in pairs)

    class Fated:
        def __init__(self, *_: Any) -> None: ...

        def __call__(self, logits: Tensor, alive: Tensor, step: int) -> tuple[Tensor, Tensor]:
            tokens = torch.tensor([(pairs[index][1] + [0] * longest)[step] for index in alive.tolist()])
            return tokens, logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)

    engine = object.__new__(transformers_engine.TransformersEngine)
    engine.__dict__ |= {
        "_model": model, "_device": "cpu", "_stop_ids": torch.tensor([-1]), "_processed": False, "_batch_size": 64,
    }  # fmt: skip
    requests = [GenerationRequest(tuple(prompt), 1, 0, Sampling(1.0, 1.0, 0, len(answer))) for prompt, answer in pairs]
    with mock.patch.object(transformers_engine, "_Sampler", Fated):
        return torch.tensor([value for (answer,) in engine.generate(requests, "batch") for value in answer.logprobs])


def assert_all_agree(model: Any, support: str) -> None:
    make_independent(model)
    batch = rows()
    with torch.no_grad():
        expected = alone(model, batch)
        assert float(expected.std()) > 0.01
        found = {"annotation": scored(model, batch)}
        if support != "recurrent":
            found["engine"] = sampled(model, batch)
        module = TokenLogprobs(model)
        found["padded"] = module(pack(batch, "padded"))["logprobs"]
        if support == "flat":
            use_packed_attention(model)
            for packing in ("flat", "shared"):
                found[packing] = module(pack(batch, packing))["logprobs"]  # type: ignore[arg-type]
            found["attend_once"] = module(pack(batch, "shared", attend_once=True))["logprobs"]
    for value in found.values():
        torch.testing.assert_close(value, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KNOWN)
def test_engine_annotation_trainer_and_transformers_agree(model_type: str) -> None:
    config = tiny_config(model_type)
    support = support_of(config.to_dict())
    expected = "flat" if model_type in FLAT else "padded" if model_type in PADDED else "recurrent"
    assert support == expected
    assert_all_agree(tiny_model(config), support)


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_that_change_what_a_layer_computes(variant: str) -> None:
    model_type, changes = VARIANTS[variant]
    config = tiny_config(model_type, **changes)
    assert_all_agree(tiny_model(config), support_of(config.to_dict()))


@pytest.mark.parametrize(
    "model_type", ["gpt_oss", "gemma2", "gemma3", "gemma4_text", "granite", "mistral", "deepseek_v3"]
)
def test_gradients_do_not_depend_on_the_packing(model_type: str) -> None:
    """Windows, soft-caps, sinks, scales, experts, latent attention; an entropy term goes through them, too."""
    model = tiny_model(tiny_config(model_type))
    found: dict[str, dict[str, Tensor]] = {}
    for packing in ("padded", "flat", "shared"):
        if packing == "flat":
            use_packed_attention(model)
        model.zero_grad()
        outputs = TokenLogprobs(model, entropy=True)(pack(rows(), packing))  # type: ignore[arg-type]
        weights = torch.linspace(-1, 1, len(outputs["logprobs"]))
        (outputs["logprobs"] * weights + outputs["entropy"] * weights.flip(0)).sum().backward()
        found[packing] = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }
    assert max(float(value.abs().max()) for value in found["padded"].values()) > 1e-2
    for packing in ("flat", "shared"):
        assert found[packing].keys() == found["padded"].keys()
        for name, value in found["padded"].items():
            assert float((found[packing][name] - value).abs().max()) < 1e-6 + 1e-3 * float(value.abs().max()), name


def test_longrope_takes_the_factors_that_a_long_sequence_gets() -> None:
    model = tiny_model(tiny_config("phi3", **VARIANTS["longrope"][1]))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        long, short = (model(ids[:, :count], use_cache=False).logits for count in (37, 10))
        fix_rope(model)
        torch.testing.assert_close(model(ids, use_cache=False).logits, long)
        held = model(ids[:, :10], use_cache=False).logits
    torch.testing.assert_close(held, long[:, :10])
    assert float((held - short).abs().max()) > 1e-2


def test_a_model_that_is_held_to_its_first_context_takes_the_short_factors() -> None:
    changes = VARIANTS["longrope"][1] | {"max_position_embeddings": 16}
    model = tiny_model(tiny_config("phi3", **changes))
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        fix_rope(model)
        torch.testing.assert_close(model(ids, use_cache=False).logits, before)


def test_experts_are_trained_without_the_auxiliary_loss() -> None:
    """A model whose config asks for router logits computes the same."""
    config = tiny_config("qwen3_moe", output_router_logits=True)
    assert_all_agree(tiny_model(config), support_of(config.to_dict()))


def test_a_vision_tower_is_published_unchanged_with_its_processor(tmp_path: Path, demonstrations: Path) -> None:
    model = make_model(tmp_path / "model")  # for its tokenizer
    whole = tiny_model(tiny_config("gemma3"))
    whole.save_pretrained(model)
    for name in PROCESSOR_FILES:
        (model / name).write_text('{"processor_class": "Gemma3Processor"}')
    output = tmp_path / "out"
    settings = {"model": model, "demonstrations": demonstrations, "global_batch": 4, "learning_rate": 1e-2}
    facts = run_here("sft", output=output, **settings).manifest.facts
    assert facts["packing"] == "shared"
    before, after = (load_file(path / "model.safetensors") for path in (model, output))
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert after.keys() == before.keys()
    assert any("language_model" in name for name in moved)
    assert not any("vision" in name or "projector" in name for name in moved)
    for name in PROCESSOR_FILES:
        assert (output / name).read_bytes() == (model / name).read_bytes()


def test_layers_that_flat_batches_are_wrong_with() -> None:
    assert support_of({"model_type": "llama", "layer_types": ["full_attention"] * 2}) == "flat"
    assert support_of({"model_type": "llama", "layer_types": ["full_attention", "conv"]}) == "padded"
    assert support_of({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}) == "flat"
    assert support_of({"model_type": "never heard of", "architectures": ["NewForCausalLM"]}) == "measured"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "encoder"),
        ({"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}, "inputs other than text"),
        *(({"model_type": kind}, reason) for kind, reason in REFUSED.items()),
    ],
)
def test_what_is_refused_by_its_config(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=re.escape(reason)):
        require_supported(settings)
    require_supported({"model_type": "phi3", "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}})


def test_an_unknown_architecture_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama by another name; then with layers that look at the batch, and at what comes later."""
    model = tiny_model(tiny_config("llama"))
    monkeypatch.setattr(type(model.config), "model_type", "future")
    assert support_of(model.config.to_dict()) == "measured"
    require_independence(model, "it")

    normalised = torch.nn.BatchNorm1d(32, affine=False, track_running_stats=False)
    layer = model.model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda hidden: normalised(plain(hidden).flatten(0, 1)).view_as(hidden)
    with pytest.raises(UserError, match="differently from that sequence alone"):
        require_independence(model, "it")
    layer.forward = lambda hidden: plain(hidden) + plain(hidden).flip(1)
    with pytest.raises(UserError, match="differently from that sequence alone"):
        require_independence(model, "it")


def test_an_unknown_architecture_is_measured_before_its_weights_are_read(tmp_path: Path) -> None:
    """By a small model made of its config; biogpt is in no table, and computed right."""
    tiny_model(tiny_config("biogpt")).save_pretrained(tmp_path)
    assert ModelInfo.read(tmp_path).support == "measured"
    assert check_architecture(tmp_path, read_config(tmp_path)) is None
    assert type(load_causal(tmp_path, torch.float32)).__name__ == "BioGptForCausalLM"


def test_the_table_in_the_docs() -> None:
    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    table = {
        kind.strip("` "): (packing.strip(), engines.strip())
        for line in lines
        if line.startswith("| `")
        for kinds, packing, engines, *_ in [line.strip("| ").split("|")]
        for kind in kinds.split(",")
    }
    expected = {
        **dict.fromkeys(FLAT, ("shared", "both")),
        **dict.fromkeys(PADDED, ("padded", "both")),
        **dict.fromkeys(RECURRENT, ("padded", "vllm")),
        **dict.fromkeys(REFUSED, ("refused", "none")),
    }
    assert table == expected
    assert FLAT >= CONDITIONAL
