"""Explores the space of plans: exhaustively if it is small, else by Markov chains from the best simple plans (as in
ReaL, arXiv 2406.14088, section 5.2) and hill climbing from the best plan that they find.

The same seed gives the same plan, unless the time limit ends the chains.
"""

import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipelines.planning.scheduling import shortest_time
from pipelines.planning.search.evaluation import PlanTable
from pipelines.planning.search.layouts import Layout
from pipelines.planning.search.plans import MAX_POOLS, WHOLE, PlanChoice, pool_divisions

EXHAUSTIVE_LIMIT = 2000
"""Number of plans up to which all are evaluated."""
CHAINS = 6
STEPS = 100
"""Steps of a chain, per role."""
HOT, COLD = 0.05, 0.002
"""Relative increase of the time that is accepted with probability 1/e, in the first step of a chain and in the last
one."""
MAX_STREAMED = 50
"""Number of the best simple plans that are also evaluated with streaming."""
MAX_TRIED = 4
"""Number of layouts of a role that hill climbing tries in another place."""


@dataclass(frozen=True)
class BestPlan:
    """The result of an exploration."""

    plan: PlanChoice | None
    """The best plan; None if none is possible."""
    space: int | None
    """The number of plans, if all were evaluated; else None."""
    evaluated: int
    seconds: float
    in_time: bool
    """Whether it ended before the time limit."""


def explore(table: PlanTable, *, seed: int = 0, seconds: float = math.inf, few: int = EXHAUSTIVE_LIMIT) -> BestPlan:
    """Find the fastest plan.

    Args:
        seed: seed of the chains.
        seconds: time limit, after which the best plan so far is returned.
        few: number of plans up to which all are evaluated.
    """
    began = time.monotonic()
    search = _Search(table, random.Random(seed), began + seconds)
    space = search.evaluate_all(few)
    if space is None:
        search.evaluate_starts()
        search.run_chains()
        search.climb()
    return BestPlan(search.best, space, table.evaluated, time.monotonic() - began, search.in_time)


def open_plans(table: PlanTable) -> Iterator[PlanChoice]:
    """All combinations of pools and places, with and without streaming; layouts are left open."""
    for plan in _places(table):
        yield plan
        if table.can_stream(plan):
            yield replace(plan, streaming=True)


def _places(table: PlanTable) -> Iterator[PlanChoice]:
    count = len(table.roles)
    no_layouts: tuple[Layout, ...] = ((),) * count
    yield PlanChoice(False, (), (WHOLE,) * count, no_layouts)
    if not table.devices:  # a scheduler's jobs have the devices that they request
        return
    yield PlanChoice(True, (), (WHOLE,) * count, no_layouts)
    for number in range(1, min(MAX_POOLS, table.devices, count) + 1):
        for pools in pool_divisions(table.devices, number):
            for places in itertools.product(range(WHOLE, number), repeat=count):
                if set(range(number)) <= set(places):
                    yield PlanChoice(True, pools, places, no_layouts)


class _Search:
    def __init__(self, table: PlanTable, rng: random.Random, deadline: float) -> None:
        self.table = table
        self.best: PlanChoice | None = None
        self.in_time = True
        self._least: tuple[float, ...] = (math.inf,)
        self._rng = rng
        self._deadline = deadline

    def evaluate_all(self, few: int) -> int | None:
        """Evaluate every plan if there are at most `few`. Returns their number; None, without evaluating any, if there
        are more."""
        plans = list(itertools.islice(open_plans(self.table), few + 1))
        if len(plans) > few:
            return None
        count, found = 0, []
        for open_plan in plans:
            options = self.table.options_of(open_plan)
            count += math.prod(len(one) for one in options)
            if count > few:
                return None
            found.append((open_plan, options))
        for open_plan, options in found:
            for chosen in itertools.product(*options):
                self.evaluate(replace(open_plan, layouts=tuple(option.layout for option in chosen)))
        return count

    def evaluate(self, plan: PlanChoice) -> tuple[float, ...] | None:
        """Evaluate a plan, and keep it if it is the best so far."""
        cost = self.table.cost(plan)
        if cost is not None and (cost < self._least or (cost == self._least and self._before(plan))):
            self.best, self._least = plan, cost
        return cost

    def _before(self, plan: PlanChoice) -> bool:
        """Whether a plan precedes the best one in a fixed order, so that ties do not depend on the order of
        evaluation."""
        return self.best is None or repr(plan) < repr(self.best)

    def is_over(self) -> bool:
        """Whether the time limit is reached."""
        if time.monotonic() > self._deadline:
            self.in_time = False
        return not self.in_time

    def fastest(self, plan: PlanChoice) -> PlanChoice | None:
        """A plan with the fastest layout of each role; None if a role has none."""
        options = self.table.options_of(plan)
        if not all(options):
            return None
        return replace(plan, layouts=tuple(one[0].layout for one in options))

    def evaluate_starts(self) -> None:
        """Evaluate the plain strategies, and every division of the devices by kinds of stages, as starts of chains."""
        self.starts: list[tuple[tuple[float, ...], PlanChoice]] = []
        for open_plan in self._simple():
            if self.is_over() and self.best is not None:
                break
            for plan in dict.fromkeys([open_plan, self.fastest(open_plan)]):
                if plan is not None and (cost := self.evaluate(plan)) is not None:
                    self.starts.append((cost, plan))
        self.starts.sort(key=lambda start: (start[0], repr(start[1])))
        for _, plan in self.starts[:MAX_STREAMED]:
            if self.table.can_stream(plan) and (cost := self.evaluate(replace(plan, streaming=True))) is not None:
                self.starts.append((cost, replace(plan, streaming=True)))
        self.starts.sort(key=lambda start: (start[0], repr(start[1])))

    def _simple(self) -> Iterator[PlanChoice]:
        table = self.table
        count = len(table.roles)
        no_layouts: tuple[Layout, ...] = ((),) * count
        whole = (WHOLE,) * count
        yield PlanChoice(False, (), whole, no_layouts)
        if not table.devices:
            return
        yield PlanChoice(True, (), whole, no_layouts)
        kinds = [role.workload for role in table.roles]
        scorers = [number for number, kind in enumerate(kinds) if kind == "scoring"]
        for pools in pool_divisions(table.devices, 2):
            for first in (0, 1):
                places = tuple(1 - first if kind == "training" else first for kind in kinds)
                yield PlanChoice(True, pools, places, no_layouts)
        for pools in pool_divisions(table.devices, 3) if scorers else ():
            for order in itertools.permutations(range(3)):
                of = dict(zip(("generation", "scoring", "training"), order, strict=True))
                if set(kinds) == set(of):
                    yield PlanChoice(True, pools, tuple(of[kind] for kind in kinds), no_layouts)
        for number in range(2, min(len(scorers), MAX_POOLS, table.devices) + 1):
            turns = {role: turn % number for turn, role in enumerate(scorers)}
            for pools in pool_divisions(table.devices, number):
                yield PlanChoice(True, pools, tuple(turns.get(role, WHOLE) for role in range(count)), no_layouts)

    def run_chains(self) -> None:
        """Run Markov chains from the best starts, with falling temperature."""
        steps = STEPS * max(1, len(self.table.roles))
        starts = [plan for _, plan in self.starts]
        firsts = list({(plan.divided, plan.pools): plan for plan in reversed(starts)}.values())[::-1][:CHAINS]
        for start in firsts:
            current, cost = start, self.table.cost(start)
            assert cost is not None
            for step in range(steps):
                if self.is_over():
                    return
                proposed = self._changed(current)
                if proposed is None or proposed == current or (other := self.evaluate(proposed)) is None:
                    continue
                temperature = HOT * (COLD / HOT) ** (step / steps) * max(self._least[0], 1e-9)
                if other[0] <= cost[0] or self._rng.random() < math.exp((cost[0] - other[0]) / temperature):
                    current, cost = proposed, other

    def _changed(self, plan: PlanChoice) -> PlanChoice | None:
        """A random neighbour of a plan; None if the change is not possible."""
        rng, count = self._rng, len(self.table.roles)
        streams = self.table.can_stream(plan)
        change = rng.randrange(6 + streams)
        if not plan.divided:
            change = rng.choice([1, *([3] if self.table.devices else []), *([6] if streams else [])])
        places = list(plan.places)
        pools = list(plan.pools)
        if change == 0:
            places[rng.randrange(count)] = rng.randrange(WHOLE, len(pools))
        elif change == 1:
            return self._with_another_layout(plan, rng.randrange(count))
        elif change == 2:
            if len(pools) < 2:
                return None
            giver, taker = rng.sample(range(len(pools)), 2)
            step = 1 << rng.randrange(max(1, self.table.devices.bit_length() - 1))
            if pools[giver] <= step:
                return None
            pools[giver] -= step
            pools[taker] += step
        elif change == 3:  # split a pool
            if len(pools) >= min(MAX_POOLS, self.table.devices, count):
                return None
            if not pools:
                pools = [self.table.devices]
                places = [0] * count
            large = pools.index(max(pools))
            if pools[large] < 2:
                return None
            size = 1 << rng.randrange(pools[large].bit_length() - (pools[large] & (pools[large] - 1) == 0))
            size = min(size, pools[large] - 1)
            pools[large] -= size
            pools.append(size)
            for number in rng.sample(range(count), rng.randint(1, count)):
                if places[number] in (large, WHOLE):
                    places[number] = len(pools) - 1
        elif change == 4:  # merge two pools
            if len(pools) < 2:
                return None
            one, other = sorted(rng.sample(range(len(pools)), 2))
            pools[one] += pools.pop(other)
            places = [one if place == other else place - (place > other) for place in places]
        elif change == 5:
            one, other = rng.randrange(count), rng.randrange(count)
            places[one], places[other] = places[other], places[one]
        else:
            return replace(plan, streaming=not plan.streaming)
        return self._normalized(replace(plan, divided=True, pools=tuple(pools), places=tuple(places)))

    def _normalized(self, plan: PlanChoice) -> PlanChoice | None:
        """Normalize a plan: pools sorted by size, none empty, and a possible layout for each role; None if a role has
        none."""
        sizes = {pool: plan.pools[pool] for pool in set(plan.places) - {WHOLE}}
        if sizes:
            largest = max(sizes, key=lambda pool: (sizes[pool], -pool))
            sizes[largest] += self.table.devices - sum(sizes.values())
        used = sorted(sizes, key=lambda pool: (-sizes[pool], pool))
        number = {pool: index for index, pool in enumerate(used)} | {WHOLE: WHOLE}
        plan = replace(
            plan,
            pools=tuple(sizes[pool] for pool in used),
            places=tuple(number[place] for place in plan.places),
        )
        options = self.table.options_of(plan)
        if not all(options):
            return None
        layouts = []
        for had, there in zip(plan.layouts, options, strict=True):
            keeps = self._rng.random() < 0.5 and any(option.layout == had for option in there)
            layouts.append(had if keeps else there[0].layout)
        return replace(plan, layouts=tuple(layouts))

    def _with_another_layout(self, plan: PlanChoice, number: int) -> PlanChoice:
        options = self.table.options_of(plan)[number]
        layouts = list(plan.layouts)
        layouts[number] = self._rng.choice(options).layout
        return replace(plan, layouts=tuple(layouts))

    def climb(self) -> None:
        """Hill climbing from the best plan: change one role's place and layout, the sizes of pools, or streaming, until
        nothing helps."""
        before = None
        while self.best is not None and self.best != before:
            before = self.best
            for plan in self._neighbours(before):
                if self.is_over():
                    return
                self.evaluate(plan)

    def _neighbours(self, plan: PlanChoice) -> Iterator[PlanChoice]:
        if self.table.can_stream(plan):
            yield replace(plan, streaming=not plan.streaming)
        for number in range(len(self.table.roles)):
            for place in range(WHOLE, len(plan.pools)) if plan.divided else (WHOLE,):
                places = (*plan.places[:number], place, *plan.places[number + 1 :])
                moved = replace(plan, places=places)
                if not set(range(len(plan.pools))) <= set(places):
                    continue
                options = self.table.options_of(moved)
                if not all(options):
                    continue
                fitting = [
                    had if any(option.layout == had for option in there) else there[0].layout
                    for had, there in zip(plan.layouts, options, strict=True)
                ]
                for option in options[number][:MAX_TRIED] if place != plan.places[number] else options[number]:
                    yield replace(moved, layouts=(*fitting[:number], option.layout, *fitting[number + 1 :]))
        for giver, taker in itertools.permutations(range(len(plan.pools)), 2):
            step = 1
            while step < plan.pools[giver]:
                pools = list(plan.pools)
                pools[giver] -= step
                pools[taker] += step
                resized = self._normalized(replace(plan, pools=tuple(pools)))
                if resized is not None and (best := self.fastest(resized)) is not None:
                    yield best
                step *= 2


def lower_bound(table: PlanTable) -> float:
    """A lower bound in seconds of all plans: the critical path with each stage in its fastest layout."""
    seconds: dict[str, float] = {}
    for name, prediction in table.fixed.items():
        seconds[name] = prediction.seconds
    for role in table.roles:
        devices = table.devices if role.requested is None else role.requested
        options = [option for exclusive in (False, True) for option in table.options.of(role, devices, exclusive)]
        for number, node in enumerate(role.nodes):
            seconds[node.name] = min((option.predictions[number].seconds for option in options), default=0.0)
    nodes = [replace(node, placement=None) for node in table.setting.graph.nodes.values()]
    return shortest_time(nodes, seconds, table.streams)
