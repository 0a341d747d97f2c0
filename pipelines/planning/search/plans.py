"""Represents the plans of the search: the pools, and the place and layout of the stages of every role.

A plan is anything that the section `placement` can express: all stages on all devices (flattening); or contiguous pools
of devices, either with some roles outside of them on the whole machine (interleaving), or with every role in a pool
(separation, called async in a run with a lag). Colocated is flattening with processes that stay loaded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from contracts.config import validate
from pipelines.config.placement import PlacementSection, Strategy
from pipelines.config.selecting import KINDS
from pipelines.planning.search.layouts import FEW_DEVICES, Layout, RoleStages

WHOLE = -1
"""The place of a role that is in no pool, on the whole machine."""
MAX_POOLS = 4


@dataclass(frozen=True)
class PlanChoice:
    """One plan of the search space."""

    divided: bool
    """Whether stages have devices exclusively, as in all strategies but flattening and colocated."""
    pools: tuple[int, ...]
    """Number of devices of each pool, the largest first."""
    places: tuple[int, ...]
    """The pool of each role, or WHOLE."""
    layouts: tuple[Layout, ...]
    """The layout of each role."""
    streaming: bool = False
    """Whether scorers start on the shards that their generation has finished so far."""


def strategy_of(plan: PlanChoice, lag: int) -> Strategy:
    """The strategy of a plan in the section `placement`."""
    if not plan.divided:
        return "flattening"
    if WHOLE in plan.places or not plan.pools:
        return "interleaving"
    return "async" if lag else "separation"


def section_of(plan: PlanChoice, roles: Sequence[RoleStages], lag: int) -> PlacementSection:
    """The section `placement` of a plan."""
    # A pool named like a kind would also take the stages of that kind that are to be in no pool.
    names = [f"pool-{chr(ord('a') + number)}" for number in range(len(plan.pools))]
    stages: dict[str, Any] = {}
    for number, role in enumerate(roles):
        entry: dict[str, Any] = {}
        if plan.places[number] != WHOLE:
            entry["pool"] = names[plan.places[number]]
        if plan.layouts[number]:
            entry["layout"] = {key: list(it) if isinstance(it, tuple) else it for key, it in plan.layouts[number]}
        if entry:
            stages[_key_of(role.name)] = entry
    data: dict[str, Any] = {"strategy": strategy_of(plan, lag), "streaming": plan.streaming}
    if plan.pools:
        data["pools"] = {names[number]: {"devices": size} for number, size in enumerate(plan.pools)}
    return validate(PlacementSection, {**data, "stages": stages}, "placement")


def jobs_section(
    plan: PlanChoice, roles: Sequence[RoleStages], base: PlacementSection, *, streaming: bool
) -> PlacementSection:
    """The section `placement` of a plan for a scheduler's jobs: `base` with other layouts and streaming."""
    data = as_data(base.model_copy(update={"expected": None}))
    stages: dict[str, Any] = data.setdefault("stages", {})
    for role, layout in zip(roles, plan.layouts, strict=True):
        if layout:
            entry = stages.pop(_key_of(role.name), {})  # moved to the end, where it overrides the others
            sizes = {key: list(it) if isinstance(it, tuple) else it for key, it in layout}
            stages[_key_of(role.name)] = {**entry, "layout": {**entry.get("layout", {}), **sizes}}
    return validate(PlacementSection, {**data, "streaming": streaming}, "placement")


def _key_of(role: str) -> str:
    """A key that matches only this role: `training` would match all stages of that kind."""
    return f"[{role[0]}]{role[1:]}" if role in KINDS else role


def fixed_section(strategy: Strategy, base: PlacementSection) -> PlacementSection:
    """The section of a plain strategy, with the layouts that the user has set."""
    stages = {key: {"layout": entry.layout.model_dump(exclude_unset=True)} for key, entry in base.stages.items()}
    return validate(
        PlacementSection, {"strategy": strategy, "streaming": base.streaming, "stages": stages}, "placement"
    )


def as_data(section: PlacementSection) -> dict[str, Any]:
    """The keys that are set in a section, as plain data."""
    return section.model_dump(mode="json", exclude_unset=True, exclude_none=True)


def sizes_of(devices: int) -> list[int]:
    """Possible sizes of a pool: any for few devices, else powers of 2 and sixteenths."""
    if devices <= FEW_DEVICES:
        return list(range(1, devices))
    found = {1 << power for power in range(devices.bit_length())}
    found |= {number * devices // FEW_DEVICES for number in range(1, FEW_DEVICES)} | {devices // 2, -(-devices // 2)}
    return sorted(size for size in found if 0 < size < devices)


def pool_divisions(devices: int, pools: int) -> Iterator[tuple[int, ...]]:
    """All divisions of the devices into `pools` pools, the largest first; the last one gets the rest."""
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


def pool_devices(pools: Sequence[int]) -> list[tuple[int, ...]]:
    """The devices of each pool: contiguous, in this order."""
    found, start = [], 0
    for size in pools:
        found.append(tuple(range(start, start + size)))
        start += size
    return found
