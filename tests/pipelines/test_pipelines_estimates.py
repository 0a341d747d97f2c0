"""Estimates of disk and memory: against a run that was made, against what is known of models, and by themselves."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipelines_smallest import FinishedRun

from contracts.manifest import MANIFEST
from contracts.outlook import Memory, measure
from contracts.stage import MINIMUM_FREE
from generation.engine import EngineSettings
from generation.vllm_engine import cpu_kv_cache_bytes
from pipelines.config.load import load_run_config
from pipelines.graph import Graph
from pipelines.iteration import build_graph
from pipelines.planning.estimates import GraphOutlook, disk_bytes, memory, published_bytes, scratch_bytes
from pipelines.planning.sizes import read_size
from training import estimates

GIB = 1 << 30
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_8B = {
    **SMOLLM2, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(finished_run: FinishedRun) -> Graph:
    """The graph of a run of one iteration, all of which is published."""
    return build_graph(load_run_config(finished_run.config, []), 1)


@pytest.fixture
def run_with(smallest: Path, tmp_path: Path) -> Callable[..., Graph]:
    """Graphs of the smallest run with a policy of some configuration, and overrides."""

    def make(model: dict[str, Any], *overrides: str) -> Graph:
        folder = tmp_path / "policy"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(model))
        return build_graph(load_run_config(smallest, [f"policy={folder}", "sft=null", *overrides]), 1)

    return make


def training_memory(graph: Graph, *, on_gpu: bool = True) -> Memory:
    found = memory(graph.nodes["iteration-001/training"], graph, on_gpu=on_gpu)
    assert found is not None
    return found


# Against what a run really wrote.


def test_no_stage_publishes_more_than_was_estimated(finished: Graph) -> None:
    for node in finished.nodes.values():
        real = sum(path.stat().st_size for path in node.output.rglob("*") if path.is_file())
        estimate = published_bytes(node, finished)
        assert estimate is not None
        assert real <= estimate <= disk_bytes(node, finished), node.name
        if node.stage.workload(node.config) == "training":
            assert disk_bytes(node, finished) < 20 * real, node.name


def test_counts_by_formula_are_those_of_the_weights(finished: Graph, tmp_path: Path) -> None:
    model = finished.directory / "setup/world/model"
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    by_weights, by_formula = read_size(model), read_size(tmp_path)
    assert by_weights is not None
    assert by_formula is not None
    assert by_weights.parameters == by_formula.parameters
    for made in ("setup/sft", "iteration-001/training", "setup/reward-model/training"):
        expected, found = (
            GraphOutlook(finished).size_of(finished.directory / made),
            read_size(finished.directory / made),
        )
        assert expected is not None
        assert found is not None
        assert found.parameters <= expected.parameters <= 1.1 * found.parameters  # the world's vocabulary is rounded up


# Against what is known.


def test_known_parameter_counts(tmp_path: Path) -> None:
    for config, count in ((SMOLLM2, 134_515_008), (LLAMA_8B, 8_030_261_248)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        size = read_size(tmp_path)
        assert size is not None
        assert size.parameters == count


def test_constants_are_those_of_the_stages(root: Path) -> None:
    for file, name, mine in (
        ("modeling/logprobs.py", "CHUNK", estimates.HEAD_CHUNK),
        ("modeling/packing.py", "PADDING_SHARE", estimates.PADDING_SHARE),
    ):
        statements = ast.parse((root / file).read_text()).body
        (value,) = [
            statement.value
            for statement in statements
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name
        ]
        assert eval(compile(ast.Expression(value), file, "eval")) == mine


def test_the_cache_on_a_cpu_is_that_of_the_engine(run_with: Callable[..., Graph]) -> None:
    graph = run_with(SMOLLM2, "generation.engine=vllm", "generation.max_prompt_tokens=100", "generation.dtype=bfloat16")
    node = graph.nodes["iteration-001/generation"]
    found = memory(node, graph, on_gpu=False)
    assert found is not None
    settings = EngineSettings((2,), 112, "bfloat16", False, Path("log"))
    assert found.parts["KV cache"] == cpu_kv_cache_bytes(node.config, settings)


# By themselves.


def test_states_of_plain_training(run_with: Callable[..., Graph]) -> None:
    count = 134_515_008
    plain = training_memory(run_with(SMOLLM2, "training.dtype=float32"))
    assert (plain.parts["weights"], plain.parts["gradients"], plain.parts["optimizer"]) == (
        4 * count,
        4 * count,
        8 * count,
    )
    assert training_memory(run_with(SMOLLM2, "training.dtype=bfloat16")).parts["weights"] == 6 * count
    assert "optimizer" not in {
        name for name, part in training_memory(run_with(SMOLLM2, "training.optimizer=sgd")).parts.items() if part
    }


@pytest.mark.parametrize("processes", [2, 8])
def test_zero_divides_the_states(run_with: Callable[..., Graph], processes: int) -> None:
    def states(zero: int | str) -> dict[str, int]:
        parallel = f"training.parallel={{dp: {processes}, zero: {zero}}}"
        return training_memory(run_with(LLAMA_8B, "training.dtype=bfloat16", parallel)).parts

    count = 8_030_261_248
    one, two, three = states(1), states(2), states(3)
    assert one["optimizer"] == two["optimizer"] == three["optimizer"] == 16 * count // processes
    assert one["weights"] == two["weights"] == 2 * count
    assert 2 * count // processes < three["weights"] < two["weights"]
    assert two["gradients"] < one["gradients"]
    fsdp2 = states("fsdp2")
    assert fsdp2["optimizer"] == 8 * count // processes
    assert 4 * count // processes < fsdp2["weights"] < 4 * count // processes + two["weights"]


def test_tensor_and_pipeline_parallelism_divide_the_layers(run_with: Callable[..., Graph]) -> None:
    def parts(parallel: str) -> dict[str, int]:
        return training_memory(run_with(LLAMA_8B, "training.dtype=float32", f"training.parallel={parallel}")).parts

    count, words = 8_030_261_248, 128256 * 4096
    assert parts("{tp: 4}")["weights"] == 4 * ((count - 2 * words) // 4 + 2 * words)
    assert parts("{tp: 4, pp: 2}")["optimizer"] == 8 * ((count - 2 * words) // 8 + words)
    assert parts("{tp: 2, pp: 2, dp: 2, zero: fsdp2}")["optimizer"] == 4 * ((count - 2 * words) // 4 + words)
    assert parts("{tp: 4}")["activations"] < parts("{}")["activations"]
    assert parts("{sp: 2}")["activations"] * 2 == parts("{}")["activations"]


def test_training_on_samples(run_with: Callable[..., Graph]) -> None:
    """Every stage has an estimate; numbers per token are what counts, and a critic has no logits."""
    ppo = ("training.algorithm=ppo", "training.settings={}", "critic.start=policy")

    def graph(*overrides: str) -> Graph:
        return run_with(LLAMA_8B, *ppo, *overrides)

    plain, longer = graph(), graph("generation.max_new_tokens=24")
    here = {name: node for name, node in plain.nodes.items() if name.startswith(("iteration-001/", "setup/critic"))}
    for name, node in here.items():
        assert published_bytes(node, plain), name
        assert memory(node, plain, on_gpu=True) or name.endswith(("evaluation", "gold", "well_formed")), name
    answers = 12 * 4
    for name, per_token in (("values", 24), ("reference", 24), ("experience", 7 + 5 * 24)):
        name = f"iteration-001/{name}"
        more, less = (published_bytes(found.nodes[name], found) for found in (longer, plain))
        assert more is not None
        assert less is not None
        assert more - less == answers * 12 * per_token
    critic = memory(plain.nodes["iteration-001/critic"], plain, on_gpu=True)
    policy = memory(plain.nodes["iteration-001/training"], plain, on_gpu=True)
    assert critic is not None
    assert policy is not None
    assert "logits" not in critic.parts
    assert policy.parts["weights"] - critic.parts["weights"] == 6 * (128256 * 4096 - 4096)
    size = GraphOutlook(plain).size_of(plain.nodes["iteration-001/critic"].output)
    assert size is not None
    assert size == GraphOutlook(plain).size_of(plain.nodes["setup/critic"].output)
    assert published_bytes(plain.nodes["setup/critic"], plain) >= 4 * size.parameters  # type: ignore[operator]
    four, eight = (memory(g.nodes["iteration-001/training"], g, on_gpu=True) for g in (plain, graph("generation.k=8")))
    assert four is not None
    assert eight is not None
    assert eight.parts["activations"] > four.parts["activations"]  # the K answers of a prompt stay together


def test_what_is_offloaded_is_not_on_the_device(run_with: Callable[..., Graph]) -> None:
    graph = run_with(LLAMA_8B, "training.parallel={zero: 3, offload: [optimizer, param]}")
    on_gpu, on_cpu = training_memory(graph), training_memory(graph, on_gpu=False)
    assert on_gpu.parts["weights"] == on_gpu.parts["optimizer"] == 0
    assert on_cpu.parts["weights"] > 0
    assert on_cpu.parts["optimizer"] > 0


def test_activations_follow_the_batch(run_with: Callable[..., Graph]) -> None:
    def activations(*overrides: str) -> int:
        rows = ("training.global_batch=100000", "generation.max_new_tokens=512")
        return training_memory(run_with(SMOLLM2, *rows, *overrides)).parts["activations"]

    assert activations("training.micro_batch_tokens=8192") * 2 == activations("training.micro_batch_tokens=16384")
    assert activations("training.gradient_checkpointing=true") < activations() / 5
    assert training_memory(run_with(SMOLLM2, "training.global_batch=1")).parts["activations"] < activations() / 10


def test_a_scorer_takes_fewer_tokens_at_once_on_a_cpu(run_with: Callable[..., Graph]) -> None:
    """So many as fit its caches, but a prompt with all its answers."""

    def tokens(*overrides: str, on_gpu: bool) -> float:
        many = ("generation.max_new_tokens=300", "generation.k=4", "prompts.train.source=hf:nobody/data")
        graph = run_with(SMOLLM2, "generation.max_prompt_tokens=500", "prompts.per_iteration=64", *many, *overrides)
        found = memory(graph.nodes["iteration-001/reference"], graph, on_gpu=on_gpu)
        assert found is not None
        layer = 16 * 576 + (2 if on_gpu else 4) * (2 * (576 + 192) + 3 * 1536)
        return found.parts["activations"] / layer

    assert tokens(on_gpu=True) == 16384
    assert tokens(on_gpu=False) == 500 + 4 * 300
    assert tokens("generation.max_new_tokens=30", on_gpu=False) == 1024


def test_adapters_are_all_that_has_a_state(run_with: Callable[..., Graph]) -> None:
    def parts(*overrides: str) -> dict[str, int]:
        return training_memory(run_with(LLAMA_8B, "training.dtype=bfloat16", *overrides)).parts

    lora = parts("training.lora={rank: 16}")
    adapters = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))  # 41.9 million, as peft counts
    assert adapters == 41_943_040
    assert lora["optimizer"] == 2 * lora["gradients"] == 8 * adapters
    assert lora["weights"] == 2 * 8_030_261_248 + 6 * adapters
    assert parts("training.lora={rank: 16, targets: [q_proj]}")["optimizer"] == 8 * 32 * 16 * 2 * 4096
    assert parts("training.lora={rank: 16, targets: [other]}") == lora
    assert lora["activations"] < parts()["activations"]
    # The hand-off of merged weights takes more than these few activations did.
    assert lora["step"] + lora["activations"] + lora["logits"] == 2 * (8_030_261_248 - 2 * 128256 * 4096)
    divided = parts("training.lora={rank: 16}", "training.parallel={dp: 8, zero: fsdp2}")
    assert divided["optimizer"] == adapters
    graph = run_with(LLAMA_8B, "training.lora={rank: 16}")
    assert scratch_bytes(graph.nodes["iteration-001/training"], graph) == 24 * adapters


def test_a_shared_prompt_counts_once(run_with: Callable[..., Graph]) -> None:
    def activations(*overrides: str) -> int:
        long = ("generation.max_new_tokens=64", "generation.max_prompt_tokens=1000", "training.global_batch=1")
        source = "prompts.train.source=hf:nobody/data"  # of which the longest prompts have to be expected
        return training_memory(run_with(SMOLLM2, *long, source, *overrides)).parts["activations"]

    shared, flat, padded = (activations(f"training.packing={name}") for name in ("shared", "flat", "padded"))
    assert shared == activations()
    tokens = (1000 + 2 * 64, 2 * 1064)
    assert shared < flat < shared * tokens[1] / tokens[0]  # attention is not shared
    assert padded < flat  # it has no groups that are padded a second time
    assert activations("training.micro_batch_tokens=1") == shared  # a row is never divided
    other = training_memory(run_with({**SMOLLM2, "model_type": "unheard-of"}, "training.global_batch=1"))
    assert (
        other.parts["activations"]
        == training_memory(run_with(SMOLLM2, "training.global_batch=1", "training.packing=padded")).parts["activations"]
    )


def test_a_reward_model_has_no_logits(run_with: Callable[..., Graph]) -> None:
    graph = run_with(SMOLLM2)
    found = memory(graph.nodes["setup/reward-model/training"], graph, on_gpu=True)
    assert found is not None
    assert "logits" not in found.parts


def test_generation_is_spread_by_tensor_parallelism(run_with: Callable[..., Graph]) -> None:
    def parts(count: int) -> dict[str, int]:
        graph = run_with(LLAMA_8B, "generation.engine=vllm", f"generation.tensor_parallel={count}")
        found = memory(graph.nodes["iteration-001/generation"], graph, on_gpu=True)
        assert found is not None
        assert found.share == 0.9
        return found.parts

    assert parts(1)["weights"] == 2 * 8_030_261_248 == 4 * parts(4)["weights"]
    assert parts(1)["KV cache"] == 4 * parts(4)["KV cache"]


def test_frozen_parameters_have_no_state(finished: Graph, shared_smallest: Path) -> None:
    # The names of parameters are in the weights: a policy from outside, with weights.
    policy = f"policy={finished.directory / 'setup/world/model'}"
    arguments = [policy, "sft=null", "name=frozen"]
    free = build_graph(load_run_config(shared_smallest, arguments), 1)
    frozen = build_graph(load_run_config(shared_smallest, [*arguments, "training.frozen=[embed_tokens]"]), 1)
    size = read_size(finished.directory / "setup/world/model")
    assert size is not None
    embedding = size.vocabulary * size.hidden  # tied to the LM head, which is frozen with it
    assert training_memory(free).parts["gradients"] - training_memory(frozen).parts["gradients"] == 4 * embedding
    node = "iteration-001/training"
    assert disk_bytes(free.nodes[node], free) - disk_bytes(frozen.nodes[node], frozen) == 24 * embedding


def test_what_cannot_be_known_is_little_and_no_error(smallest: Path, tmp_path: Path) -> None:
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text(json.dumps(SMOLLM2))
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"hidden_size": "wide"}')
    for policy in ("hf:nobody/nothing", "nowhere", tmp_path / "torn", tmp_path / "odd"):
        overrides = [
            f"policy={policy}",
            "sft=null",
            "prompts.train.source=hf:nobody/data",
            "prompts.per_iteration=null",
        ]
        graph = build_graph(load_run_config(smallest, overrides), 1)
        for node in graph.nodes.values():
            assert disk_bytes(node, graph) > 0
            memory(node, graph, on_gpu=False)
        for name in ("prompts/train", "iteration-001/generation", "iteration-001/reward", "iteration-001/training"):
            assert disk_bytes(graph.nodes[name], graph) == MINIMUM_FREE
        assert memory(graph.nodes["iteration-001/training"], graph, on_gpu=False) is None


def test_the_number_of_prompts_is_enough_to_estimate_their_answers(smallest: Path) -> None:
    config = load_run_config(smallest, ["prompts.train.source=hf:nobody/data", "prompts.per_iteration=20000"])
    graph = build_graph(config, 1)
    tokens = 20000 * 4 * 12
    assert disk_bytes(graph.nodes["iteration-001/generation"], graph) > 40 * tokens


def test_rows_of_files(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "x" * 90}) + "\n"
    (tmp_path / "small.jsonl").write_text(line * 10)
    (tmp_path / "large.jsonl").write_text(line * 50_000)
    small, large = measure(tmp_path / "small.jsonl"), measure(tmp_path / "large.jsonl")
    assert small is not None
    assert large is not None
    assert (small.count, small.bytes, small.longest) == (10, 10 * len(line), len(line))
    assert large.bytes == 50_000 * len(line)
    assert 50_000 <= large.count <= 50_050
    both = measure(tmp_path)
    assert both is not None
    assert both.count == small.count + large.count
    (tmp_path / "data.parquet").write_bytes(b"x" * 1000)
    parquet = measure(tmp_path / "data.parquet")
    assert parquet is not None
    assert parquet.bytes > 1000
    assert measure(tmp_path / "nowhere") is None


def test_rows_of_a_split_and_of_one_document(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("prompt\n" + "why?\n" * 99)
    (tmp_path / "test.json").write_text(json.dumps([{"prompt": "x" * 90}] * 100))
    train, test = measure(tmp_path), measure(tmp_path, "test")
    assert train is not None
    assert test is not None
    assert (train.count, test.bytes) == (100, (tmp_path / "test.json").stat().st_size)
    assert 20 < test.count < 500
    assert measure(tmp_path, "validation") is None


def test_a_published_prompt_set_of_the_hub_is_known(smallest: Path) -> None:
    graph = build_graph(load_run_config(smallest, ["prompts.train.source=hf:nobody/data"]), 1)
    output = graph.nodes["prompts/train"].output
    output.mkdir(parents=True)
    (output / MANIFEST).write_text("{}")
    (output / "shard-00000.jsonl").write_text('{"messages": []}\n' * 1000)
    assert disk_bytes(graph.nodes["prompts/train"], graph) != MINIMUM_FREE
