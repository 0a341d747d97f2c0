"""Any layout to any other: every element once, what is moved is what the plan says, and replicas share the load."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from contracts.errors import UserError
from reallocation import planning
from reallocation.layouts import Division, GlobalTensor, LocalPart, RankLayout, layer_bounds, part_of
from reallocation.planning import ReallocationPlan, intersection, plan, runs_in_order

VOCABULARY = 12


def config_of(**changes: Any) -> dict[str, Any]:
    """A tiny Llama's config.json."""
    return {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 2, "intermediate_size": 12, "vocab_size": VOCABULARY,
        "tie_word_embeddings": True, **changes,
    }  # fmt: skip


def tensors_of(config: dict[str, Any]) -> dict[str, GlobalTensor]:
    """Its tensors; one of each kind in every layer."""
    hidden, width = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    inner = config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj.weight": (query, hidden), "self_attn.k_proj.weight": (key, hidden),
            "self_attn.q_proj.bias": (query,), "self_attn.o_proj.weight": (hidden, query),
            "mlp.up_proj.weight": (inner, hidden), "mlp.down_proj.weight": (hidden, inner),
            "mlp.down_proj.bias": (hidden,), "input_layernorm.weight": (hidden,),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}"] = shape
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCABULARY, hidden)
    return {name: GlobalTensor(name, "BF16", shape) for name, shape in shapes.items()}


@st.composite
def layouts(draw: st.DrawFn, layers: int) -> RankLayout:
    pp = draw(st.integers(1, min(layers, 3)))
    cuts = sorted(draw(st.permutations(range(1, layers)))[: pp - 1])
    uneven = tuple(end - start for start, end in itertools.pairwise([0, *cuts, layers]))
    return RankLayout(
        dp=draw(st.integers(1, 3)),
        tp=draw(st.sampled_from([1, 2, 4])),
        pp=pp,
        sharding=draw(st.sampled_from(["none", "rows", "flat"])),
        vocabulary=draw(st.sampled_from(["divided", "whole"])),
        layers=uneven if draw(st.booleans()) else (),
    )


@st.composite
def pairs_of_divisions(draw: st.DrawFn) -> tuple[Division, Division]:
    config = config_of(
        num_hidden_layers=draw(st.integers(1, 4)),
        num_key_value_heads=draw(st.sampled_from([1, 2, 4])),
        head_dim=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=4 * draw(st.integers(1, 4)),
        tie_word_embeddings=draw(st.booleans()),
    )
    tensors, layers = tensors_of(config), config["num_hidden_layers"]
    return Division(draw(layouts(layers)), config, tensors), Division(draw(layouts(layers)), config, tensors)


def elements_of(part: LocalPart) -> list[int]:
    """The flat index in the whole tensor of each element of a part, by the definition of a part."""
    inner = part.last - part.first
    return [(place // inner) * part.width + part.first + place % inner for place in range(part.start, part.end)]


def carry_out(found: ReallocationPlan, source: Division, target: Division) -> dict[tuple[str, int], list[int | None]]:
    """Execute a plan on parts whose elements are their own indices, as bytes; no byte may be written twice."""
    written: dict[tuple[str, int], list[int | None]] = {}
    for name in source.tensors:
        for rank, part in target.parts(name).items():
            written[name, rank] = [None] * (2 * part.elements)
    for transfer in found.transfers:
        held = elements_of(source.parts(transfer.tensor)[transfer.source])
        values = [2 * index + half for index in held for half in (0, 1)]
        place = written[transfer.tensor, transfer.target]
        for to, begin, length in transfer.runs():
            assert place[to : to + length] == [None] * length
            assert begin + length <= len(values)
            place[to : to + length] = values[begin : begin + length]
    return written


@given(pairs_of_divisions())
def test_every_element_of_every_target_is_written_once(pair: tuple[Division, Division]) -> None:
    source, target = pair
    found = plan(source.tensors, source, target)
    for (name, rank), place in carry_out(found, source, target).items():
        wanted = elements_of(target.parts(name)[rank])
        assert place == [2 * index + half for index in wanted for half in (0, 1)]
    assert found == plan(source.tensors, source, target)


@given(pairs_of_divisions())
def test_the_plan_counts_what_is_moved(pair: tuple[Division, Division]) -> None:
    source, target = pair
    found = plan(source.tensors, source, target)
    away = [transfer for transfer in found.transfers if transfer.source != transfer.target]
    assert found.moved == sum(transfer.bytes for transfer in away) == sum(found.received.values())
    shares = sum(part.elements for name in source.tensors for part in target.parts(name).values())
    assert found.written == 2 * shares
    for transfer in away:  # nothing is fetched that the process has itself
        own = source.parts(transfer.tensor).get(transfer.target)
        assert own is None or own != source.parts(transfer.tensor)[transfer.source]


@given(pairs_of_divisions())
def test_runs_come_in_the_order_of_the_target(pair: tuple[Division, Division]) -> None:
    source, target = pair
    found = plan(source.tensors, source, target)
    for (name, rank), group in itertools.groupby(found.transfers, key=lambda each: (each.tensor, each.target)):
        transfers, place = list(group), 0
        runs = {(transfer.source, *run) for transfer in transfers for run in transfer.runs()}
        for source, start, begin, length in runs_in_order(transfers):
            assert start == place
            assert (source, start, begin, length) in runs
            place += length
        assert place == 2 * target.parts(name)[rank].elements


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    dims=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    parts=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    shards=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    sharding=st.tuples(st.sampled_from(["none", "rows", "flat"]), st.sampled_from(["none", "rows", "flat"])),
)
def test_tensors_of_any_shape(
    shape: list[int], dims: tuple[int, int], parts: tuple[int, int], shards: tuple[int, int], sharding: tuple[Any, Any]
) -> None:
    tensor = GlobalTensor("x", "U8", tuple(shape))
    assume(all(dim < len(shape) for dim in dims))
    assume(0 in dims or dims[0] == dims[1])
    sides = []
    for dim, count, number, kind in zip(dims, parts, shards, sharding, strict=True):
        bounds = [round(index * shape[dim] / count) for index in range(count + 1)]
        sides.append(
            [
                part_of(tensor, (dim, *span), sharding=kind, shards=number, shard=shard)
                for span in itertools.pairwise(bounds)
                for shard in range(number if kind != "none" else 1)
            ]
        )
    for side in sides:
        assert all(math.prod(part.shape) == part.elements for part in side)
        assert sorted(itertools.chain.from_iterable(map(elements_of, side))) == list(range(tensor.elements))
    for one, other in itertools.product(*sides):
        both = [
            (source + index, target + index)
            for transfer in intersection(one, other, 1)
            for target, source, length in transfer.runs()
            for index in range(length)
        ]
        here, there = elements_of(one), elements_of(other)
        assert {(here[source], there[target]) for source, target in both} == {(i, i) for i in {*here} & {*there}}
        assert len(both) == len(set(both)) == len({*here} & {*there})


@given(replicas=st.integers(2, 5), targets=st.integers(1, 8), layers=st.integers(1, 4))
def test_replicas_share_what_is_to_be_sent(replicas: int, targets: int, layers: int) -> None:
    config = config_of(num_hidden_layers=layers)
    tensors = tensors_of(config)
    source = Division(RankLayout(dp=replicas), config, tensors)
    target = Division(RankLayout(dp=targets), config, tensors)
    found = plan(tensors, source, target, target_processes=range(replicas, replicas + targets))
    largest = max(2 * tensor.elements for tensor in tensors.values())
    assert found.moved == targets * sum(2 * tensor.elements for tensor in tensors.values())
    assert max(found.sent.values()) - min(found.sent[process] for process in range(replicas)) <= largest


@pytest.mark.parametrize(
    ("layouts", "name"),
    [
        (("dp=900,shard=flat", "dp=700,shard=flat"), "model.layers.0.mlp.down_proj.weight"),
        (("dp=300,tp=4,shard=rows", "dp=700,tp=2,shard=rows"), "model.layers.0.mlp.down_proj.weight"),
        (("dp=300,tp=4,shard=flat", "dp=700,shard=flat"), "model.layers.0.mlp.down_proj.weight"),
        (("tp=1024,vocab=divided", "dp=1500,shard=rows"), "model.embed_tokens.weight"),
    ],
)
@pytest.mark.parametrize("way", [1, -1], ids=["there", "back"])
def test_parts_are_compared_with_those_that_are_near(
    layouts: tuple[str, str], name: str, way: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How often grows with what is moved, not with the ranks of the one layout times those of the other."""
    compared = 0

    def counting(*parts: Any) -> Any:
        nonlocal compared
        compared += 1
        return intersection(*parts)

    monkeypatch.setattr(planning, "intersection", counting)
    config = config_of(num_attention_heads=1024, num_key_value_heads=1024, intermediate_size=1024, hidden_size=1024)
    shape = (1024, 1024) if "layers" in name else (65_536, 4)
    tensors = {name: GlobalTensor(name, "BF16", shape)}
    source, target = (Division(RankLayout.parse(text), config, tensors) for text in layouts[::way])
    found = plan(tensors, source, target)
    assert found.written == 2 * sum(part.elements for part in target.parts(name).values())
    ranks = source.layout.ranks + target.layout.ranks
    assert compared <= len(found.transfers) + ranks < source.layout.ranks * target.layout.ranks / 50


def test_many_replicas_share_what_is_to_be_sent() -> None:
    """Of 10,000, without looking at all of them for each of 10,000 targets: as many bytes from each."""
    config, count = config_of(), 10_000
    tensors = {"x": GlobalTensor("x", "BF16", (8,))}
    source, target = (Division(RankLayout(dp=count), config, tensors) for _ in range(2))
    found = plan(tensors, source, target, target_processes=range(count, 2 * count))
    assert {found.sent[process] for process in range(count)} == {16}
    assert [transfer.source for transfer in found.transfers] == list(range(count))


def test_columns_are_one_transfer_and_contiguous_ranges_one_run() -> None:
    tensor = GlobalTensor("x", "BF16", (1000, 64))
    whole, columns = part_of(tensor), part_of(tensor, (1, 16, 32))
    (transfer,) = intersection(whole, columns, 2)
    assert (transfer.rows, transfer.length, transfer.source_start, transfer.source_stride) == (1000, 32, 32, 128)
    assert [each.rows for each in intersection(whole, part_of(tensor, (0, 10, 30)), 2)] == [1]
    shard = part_of(tensor, (1, 16, 32), sharding="rows", shards=3, shard=1)
    assert [(each.rows, each.length) for each in intersection(columns, shard, 2)] == [(1, 334 * 32)]


def test_fewer_key_value_heads_than_ranks_are_replicated() -> None:
    config = config_of(num_key_value_heads=2, num_attention_heads=8, head_dim=1, intermediate_size=16)
    division = Division(RankLayout(tp=8), config, tensors_of(config))
    spans = [elements_of(part) for _, part in sorted(division.parts("model.layers.0.self_attn.k_proj.weight").items())]
    assert [span[0] // 8 for span in spans] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert Counter(map(tuple, spans)).most_common(1)[0][1] == 4


def test_a_tied_embedding_is_in_the_first_and_in_the_last_stage() -> None:
    tied, untied = config_of(), config_of(tie_word_embeddings=False)
    for config, ranks in ((tied, {0, 2}), (untied, {0})):
        division = Division(RankLayout(pp=3), config, tensors_of(config))
        assert division.parts("model.embed_tokens.weight").keys() == ranks
    classifier = config_of(architectures=["LlamaForSequenceClassification"])
    tensors = tensors_of(classifier) | {"score.weight": GlobalTensor("score.weight", "F32", (1, 8))}
    division = Division(RankLayout(pp=3, tp=2), classifier, tensors)
    assert division.parts("model.embed_tokens.weight").keys() == {0, 1}
    assert division.parts("score.weight").keys() == {4, 5}


def test_adapters_are_cut_as_what_they_adapt() -> None:
    config = config_of()
    prefix = "base_model.model.model.layers.1."
    shapes = {
        "self_attn.q_proj.lora_A.weight": (4, 8), "self_attn.q_proj.lora_B.weight": (8, 4),
        "mlp.down_proj.lora_A.weight": (4, 12), "mlp.down_proj.lora_B.weight": (8, 4),
    }  # fmt: skip
    tensors = {prefix + name: GlobalTensor(prefix + name, "F32", shape) for name, shape in shapes.items()}
    division = Division(RankLayout(tp=2), config, tensors)
    assert [division.parts(name)[1].shape for name in tensors] == [(4, 8), (4, 4), (4, 6), (8, 4)]


def test_uneven_stages() -> None:
    assert layer_bounds(7, 3) == [0, 2, 5, 7]
    config = config_of(num_hidden_layers=7)
    division = Division(RankLayout.parse("pp=3,layers=1+2+4"), config, tensors_of(config))
    ranks = [list(division.parts(f"model.layers.{layer}.mlp.up_proj.weight")) for layer in range(7)]
    assert ranks == [[0], [1], [1], [2], [2], [2], [2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=0", "tp='0' is not a positive number"),
        ("tp=2,tp=4", "'tp' occurs twice"),
        ("tq=2", r"'tq' is not a key. Did you mean 'tp'"),
        ("shard=columns", "shard='columns' is not one of none, rows, flat"),
        ("pp=2,layers=3", "layers has 1 numbers, but pp=2"),
    ],
)
def test_layouts_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RankLayout.parse(text)


@pytest.mark.parametrize("text", ["tp=1", "tp=4,pp=2", "dp=2,tp=2,shard=rows,vocab=whole", "pp=2,layers=9+7"])
def test_a_layout_is_written_as_it_is_read(text: str) -> None:
    assert str(RankLayout.parse(text)) == text


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("tp=3", {}, r"tp=3 does not divide num_attention_heads \(4\)"),
        ("tp=4", {"num_key_value_heads": 3}, r"tp=4 does not divide num_key_value_heads \(3\)"),
        ("tp=2", {"intermediate_size": 9}, r"tp=2 does not divide intermediate_size \(9\)"),
        ("pp=4", {}, "has 3 layers, which do not fit these pipeline stages"),
        ("pp=2,layers=1+1", {}, "has 3 layers, which do not fit these pipeline stages"),
        ("tp=2", {"architectures": ["GPTNeoXForCausalLM"]}, "is a GPTNeoXForCausalLM; tensor and pipeline"),
    ],
)
def test_models_that_a_layout_does_not_divide(layout: str, changes: dict[str, Any], message: str) -> None:
    config = config_of(**changes)
    with pytest.raises(UserError, match=message):
        Division(RankLayout.parse(layout), config, tensors_of(config))


def test_a_tensor_that_is_not_known() -> None:
    tensors = {"model.layers.0.mlp.experts.weight": GlobalTensor("model.layers.0.mlp.experts.weight", "F32", (4, 8))}
    with pytest.raises(
        UserError, match=r"holds model.layers.0.mlp.experts.weight, which tensor parallelism does not support"
    ):
        Division(RankLayout(tp=2), config_of(), tensors)
    assert Division(RankLayout(dp=2, sharding="rows"), config_of(), tensors).parts(next(iter(tensors)))[1].shape == (
        2,
        8,
    )
