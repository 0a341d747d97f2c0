"""Plans: which pools there are, where the stages of every role run, and in which layouts.

A plan is what the section `placement` can say: all stages on all devices (flattening), or pools of devices that lie
beside each other, with some roles outside of them on the whole machine (interleaving), or with all roles in one
(separation; async in a run with a lag, which is the same rule). Colocated is flattening with processes that stay.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from contracts.config import validate
from pipelines.config.placement import PlacementSection, Strategy
from pipelines.config.selecting import KINDS
from pipelines.planning.search.layouts import FEW, Layout, RoleStages

WHOLE = -1
"""The place of a role that is in no pool."""
MOST_POOLS = 4


@dataclass(frozen=True)
class PlanChoice:
    """One point of the space."""

    divided: bool
    """Whether stages have devices for themselves: all strategies but flattening and colocated."""
    pools: tuple[int, ...]
    """Devices of each, the largest first."""
    places: tuple[int, ...]
    """Of each role its pool, or WHOLE."""
    layouts: tuple[Layout, ...]
    """Of each role."""
    streaming: bool = False
    """Whether scorers start on the shards that their generation has finished so far."""


def strategy_of(plan: PlanChoice, lag: int) -> Strategy:
    """What the section calls it."""
    if not plan.divided:
        return "flattening"
    if WHOLE in plan.places or not plan.pools:
        return "interleaving"
    return "async" if lag else "separation"


def section_of(plan: PlanChoice, calls: Sequence[RoleStages], lag: int) -> PlacementSection:
    """The section `placement` that says it."""
    # A pool that is called as a kind would take the stages of that kind which are to be in none.
    names = [f"pool-{chr(ord('a') + number)}" for number in range(len(plan.pools))]
    stages: dict[str, Any] = {}
    for number, call in enumerate(calls):
        entry: dict[str, Any] = {}
        if plan.places[number] != WHOLE:
            entry["pool"] = names[plan.places[number]]
        if plan.layouts[number]:
            entry["layout"] = {key: list(it) if isinstance(it, tuple) else it for key, it in plan.layouts[number]}
        if entry:
            stages[_key_of(call.role)] = entry
    data: dict[str, Any] = {"strategy": strategy_of(plan, lag), "streaming": plan.streaming}
    if plan.pools:
        data["pools"] = {names[number]: {"devices": size} for number, size in enumerate(plan.pools)}
    return validate(PlacementSection, {**data, "stages": stages}, "placement")


def jobs_section(
    plan: PlanChoice, calls: Sequence[RoleStages], base: PlacementSection, *, streaming: bool
) -> PlacementSection:
    """The section that says it of stages that are a scheduler's jobs: `base`, with other layouts and streaming."""
    data = as_data(base.model_copy(update={"expected": None}))
    stages: dict[str, Any] = data.setdefault("stages", {})
    for call, layout in zip(calls, plan.layouts, strict=True):
        if layout:
            entry = stages.pop(_key_of(call.role), {})  # the last one holds
            sizes = {key: list(it) if isinstance(it, tuple) else it for key, it in layout}
            stages[_key_of(call.role)] = {**entry, "layout": {**entry.get("layout", {}), **sizes}}
    return validate(PlacementSection, {**data, "streaming": streaming}, "placement")


def _key_of(role: str) -> str:
    """A key that names this role alone: `training` would name all stages of that kind."""
    return f"[{role[0]}]{role[1:]}" if role in KINDS else role


def fixed_section(strategy: Strategy, base: PlacementSection) -> PlacementSection:
    """A strategy as it is by itself, with the layouts that the user has set."""
    stages = {key: {"layout": entry.layout.model_dump(exclude_unset=True)} for key, entry in base.stages.items()}
    return validate(
        PlacementSection, {"strategy": strategy, "streaming": base.streaming, "stages": stages}, "placement"
    )


def as_data(section: PlacementSection) -> dict[str, Any]:
    """What is set in it."""
    return section.model_dump(mode="json", exclude_unset=True, exclude_none=True)


def sizes_of(devices: int) -> list[int]:
    """How many devices a pool may have: of few devices any number; of more, powers of 2 and sixteenths."""
    if devices <= FEW:
        return list(range(1, devices))
    found = {1 << power for power in range(devices.bit_length())}
    found |= {number * devices // FEW for number in range(1, FEW)} | {devices // 2, -(-devices // 2)}
    return sorted(size for size in found if 0 < size < devices)


def divisions(devices: int, pools: int) -> Iterator[tuple[int, ...]]:
    """All ways to divide the devices into so many pools, the larger first; what others leave, the last one has."""
    sizes = sizes_of(devices)

    def divide(left: int, most: int, count: int) -> Iterator[tuple[int, ...]]:
        if count == 1:
            if 0 < left <= most:
                yield (left,)
            return
        for size in reversed(sizes):
            if size <= most and size < left:
                yield from ((size, *rest) for rest in divide(left - size, size, count - 1))

    if 1 <= pools <= devices:
        yield from divide(devices, devices, pools)


def offsets(pools: Sequence[int]) -> list[tuple[int, ...]]:
    """The devices of each pool: they lie beside each other, in this order."""
    found, start = [], 0
    for size in pools:
        found.append(tuple(range(start, start + size)))
        start += size
    return found
