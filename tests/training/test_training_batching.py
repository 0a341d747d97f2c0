"""The plan: every row once, whatever the number of processes and the token budget."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.packing import Packing, tokens_of
from modeling.rows import Response, Row, token_ids
from training.batching import count_steps, divide, global_batches
from training.schedule import learning_rate


def row(index: int, lengths: list[int]) -> Row:
    return Row(f"row-{index}", token_ids([1]), tuple(Response(token_ids([1] * (length - 1))) for length in lengths))


rows_strategy = st.lists(st.lists(st.integers(2, 40), min_size=2, max_size=2), min_size=1, max_size=30).map(
    lambda lengths: [row(index, both) for index, both in enumerate(lengths)]
)


@given(
    rows=st.integers(1, 60),
    global_batch=st.integers(1, 20),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
    max_steps=st.none() | st.integers(1, 12),
)
def test_every_epoch_is_a_permutation(rows: int, global_batch: int, epochs: int, seed: int, max_steps: int) -> None:
    options = {"global_batch": global_batch, "epochs": epochs, "seed": seed}
    batches = list(global_batches(rows, **options))
    per_epoch = -(-rows // global_batch)
    for epoch in range(epochs):
        part = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(index for batch in part for index in batch) == list(range(rows))
        assert all(len(batch) == global_batch for batch in part[:-1])
    cut = list(global_batches(rows, **options, max_steps=max_steps))
    assert cut == batches[: len(cut)]
    assert len(cut) == count_steps(rows, global_batch, epochs, max_steps)


def test_order_depends_on_seed_and_epoch() -> None:
    first, second = (list(global_batches(50, global_batch=50, epochs=2, seed=seed)) for seed in (0, 1))
    assert len({*first, *second}) == 4


@given(
    rows=rows_strategy,
    processes=st.integers(1, 5),
    budget=st.integers(1, 400),
    packing=st.sampled_from(["shared", "flat", "padded"]),
)
def test_division_keeps_every_row_once(rows: list[Row], processes: int, budget: int, packing: Packing) -> None:
    batch = tuple(range(len(rows)))
    shares = divide(batch, rows, processes=processes, budget=budget, packing=packing)
    assert len(shares) == processes
    assert len({len(share) for share in shares}) == 1, "collectives need equally many micro-batches"
    micro_batches = [micro for share in shares for micro in share]
    counted = Counter(index for micro in micro_batches if micro.weight == 1 for index in micro.rows)
    assert counted == Counter(batch)
    assert all(micro.weight in (0.0, 1.0) for micro in micro_batches)
    for micro in micro_batches:
        if packing == "padded":
            size = sum(len(rows[i].responses) for i in micro.rows) * max(rows[i].longest for i in micro.rows)
        else:
            size = sum(tokens_of(rows[i], packing) for i in micro.rows)
        assert size <= budget or len(micro.rows) == 1


def test_work_is_shared_equally() -> None:
    rows = [row(index, [length, length]) for index, length in enumerate(range(2, 42))]
    shares = divide(tuple(range(40)), rows, processes=2, budget=200, packing="flat")
    loads = [sum(rows[i].longest for micro in share if micro.weight for i in micro.rows) for share in shares]
    assert abs(loads[0] - loads[1]) <= 20
    fillers = [micro for share in shares for micro in share if not micro.weight]
    assert len(fillers) <= 1


@given(total=st.integers(1, 500), warmup=st.floats(0, 0.99), shape=st.sampled_from(["cosine", "linear", "constant"]))
def test_schedule_rises_then_falls_and_wastes_no_step(total: int, warmup: float, shape: str) -> None:
    rates = [learning_rate(s, total, peak=2.0, shape=shape, warmup_ratio=warmup) for s in range(total)]  # type: ignore[arg-type]
    assert min(rates) > 0
    assert max(rates) <= 2.0
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_schedule_by_hand() -> None:
    rates = [learning_rate(s, 5, peak=1.0, shape="linear", warmup_ratio=0.2) for s in range(5)]
    assert rates == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25])
    assert learning_rate(0, 1, peak=1.0, shape="cosine", warmup_ratio=0.5) == 1.0
