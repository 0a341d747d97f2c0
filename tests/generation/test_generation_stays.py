"""Engines of every kind outlive the stage that has opened them, and take the next policy in place."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from generation_runs import LIBRARIES, generate, overrides, rows
from warm_stages import warm_socket

from contracts.artifacts import Artifact
from contracts.checkpoint_probe import Probe
from contracts.fingerprint import digest, weights_fingerprint
from contracts.ledger import Ledger
from contracts.publication import Publication
from contracts.records import CHECKPOINT, ROLLOUTS
from contracts.versions import source_version
from generation.config import GenerationConfig
from generation.stages.generation import GENERATION
from pipelines.execution.supervisor import AttemptRequest, supervise


@pytest.fixture(scope="module")
def policies(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints as trainings publish them, of the same architecture."""
    import torch
    from transformers import LlamaForCausalLM

    made = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("policies") / f"policy-{seed}"
        source = shutil.copytree(policy, folder.with_name("source"))
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaForCausalLM.from_pretrained(policy).config).eval()
        model.save_pretrained(source)
        ids = list(range(5, 25))
        with torch.no_grad():
            said = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        probe = Probe(ids[:8], ids[8:], [float(said[place - 1, ids[place]]) for place in range(8, 20)], "float32")
        publication = Publication(folder, CHECKPOINT, "training", digest(seed))
        publication.begin()
        for file in source.iterdir():
            shutil.copyfile(file, publication.scratch(file.name))
            publication.commit(file.name, Ledger("pairs"))
        publication.publish(
            key_parts={}, inputs={}, input_paths={}, unit="pairs", weights=weights_fingerprint(source), versions={},
            seconds={}, facts={"probe": msgspec.to_builtins(probe)},
        )  # fmt: skip
        made.append(folder)
    return made


def stage(folder: Path, config: dict[str, Any], module: str = "generation") -> Artifact:
    """A stage as the driver has it run: by a supervisor, which ends what belongs to the attempt."""
    output, attempt = folder / "out", folder / "attempt"
    attempt.mkdir(parents=True)
    label = GENERATION.label(GenerationConfig(output=output, **config))
    request = AttemptRequest(
        [sys.executable, "-m", module, *overrides(output, config)], {}, [], os.getcwd(), "", None,
        warm=str(warm_socket("generation", *LIBRARIES)), warm_source=source_version("generation"), warm_seconds=300.0,
        label=label,
    )  # fmt: skip
    (attempt / "request.json").write_bytes(msgspec.json.encode(request))
    code = supervise(str(attempt))
    assert code == 0, (attempt / "stage.log").read_text()[-3000:]
    return Artifact.open(output, ROLLOUTS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["tensor_parallel", "servers", "replicas"])
def test_an_engine_stays_for_the_stages_of_two_policies(
    way: str, policies: list[Path], prompts: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm", reason="vLLM is in the generation environment only", exc_type=ImportError)
    config = {"prompts": prompts, "k": 2, "temperatures": [0.0, 1.0], "max_new_tokens": 6, "shard_size": 13}
    if way == "servers":
        config |= {"logprob_mode": "raw"}
    else:
        config |= {"top_k": 40, "top_p": 0.95}
    many = {way: 1 if way == "servers" else 2}
    module = "tests.generation.forked_workers" if way == "tensor_parallel" else "generation"
    made = [
        stage(tmp_path / str(number), {**config, **many, "policy": policies[which], "seed": number}, module)
        for number, which in enumerate((0, 1, 1))
    ]
    facts = [artifact.manifest.facts for artifact in made]
    if way != "replicas":  # either replica may have found all shards taken
        assert [each["start"] for each in facts] == ["loaded", "updated", "kept"]
        assert "read_back" not in facts[0]
        assert facts[1]["read_back"] == facts[2]["read_back"]
        assert 0 < made[1].manifest.seconds["weights"] <= made[1].manifest.seconds["load"]
    # Another engine of one process alone says the same.
    cold = generate(tmp_path / "cold", **config, policy=policies[1], seed=1)
    assert cold.manifest.facts["start"] == "loaded"
    assert (made[1].manifest.key == cold.manifest.key) == (way != "tensor_parallel")
    same = 0
    for one, other in zip(rows(made[1]), rows(cold), strict=True):
        for mine, theirs in zip(one.completions, other.completions, strict=True):
            assert mine.seed == theirs.seed
            if mine.response_ids == theirs.response_ids:
                same += 1
                assert mine.finish_reason == theirs.finish_reason
                assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert one.completions[0].response_ids == other.completions[0].response_ids
    if way == "servers":
        assert same > 49  # of 52: a last bit can decide between two tokens
    else:
        assert same == 52
    if way == "replicas":
        assert made[1].manifest.digest == cold.manifest.digest
