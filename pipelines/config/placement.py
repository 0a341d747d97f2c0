"""Defines the section `placement`: the devices of each stage, and which stages may run at the same time."""

from typing import Any, Literal, Self, TypeAlias

from pydantic import model_validator

from contracts.config import Section, runtime
from contracts.errors import did_you_mean
from contracts.fingerprint import digest

Strategy: TypeAlias = Literal["flattening", "interleaving", "separation", "async", "colocated"]
STRATEGIES: tuple[Strategy, ...] = ("flattening", "interleaving", "separation", "async", "colocated")
WHOLE: tuple[Strategy, ...] = ("flattening", "colocated")
"""Strategies that give every stage all devices of this machine."""
SEPARATING: tuple[Strategy, ...] = ("separation", "async")
"""Strategies with separate pools for generation and training."""


class PoolSection(Section):
    """Devices reserved for the stages of this pool. A number or a list is short for `devices`.

    `devices` are of this machine; `partition` and `nodes` are of a scheduler's cluster.
    """

    devices: int | list[int] | None = runtime(None)
    """Number of devices, or a list of them, counted from 0: GPUs, or this machine's cores if it has none. Pools that
    give a number get devices in the order in which the pools are written, after those that list theirs."""
    partition: str | None = runtime(None, min_length=1)
    """Scheduler partition for the jobs of these stages."""
    nodes: str | None = runtime(None, min_length=1)
    """Cluster nodes reserved for these stages, in the scheduler's notation: "gpu[01-04],gpu07"."""

    @model_validator(mode="before")
    @classmethod
    def _read_devices(cls, value: Any) -> Any:
        return {"devices": value} if isinstance(value, int | list) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        requested = [self.devices] if isinstance(self.devices, int) else self.devices
        if requested is not None and (not requested or min(requested) < isinstance(self.devices, int)):
            raise ValueError(
                f"devices is {self.devices}; it must be a number of devices, at least 1, or a list of them, counted "
                "from 0."
            )
        if isinstance(self.devices, list) and len(set(self.devices)) < len(self.devices):
            raise ValueError(f"devices is {self.devices}, which names a device twice. Take one out.")
        return self


class LayoutSection(Section):
    """Parallel layout of a stage on its devices. An unset key is that of the stage's own section, or follows from
    the number of devices."""

    dp: int | None = runtime(None, ge=1)
    """Data parallel size of a training."""
    tp: int | None = runtime(None, ge=1)
    """Tensor parallel size of a training. That of a generation changes its result: set generation.tensor_parallel."""
    pp: int | None = runtime(None, ge=1)
    """Pipeline parallel size of a training."""
    sp: int | None = runtime(None, ge=1)
    """Sequence parallel size of a training."""
    zero: Literal[0, 1, 2, 3, "fsdp2"] | None = runtime(None)
    """Sharding of a training over its dp processes."""
    offload: list[Literal["optimizer", "param"]] | None = runtime(None)
    """What DeepSpeed offloads to CPU memory in a training."""
    micro_batch_tokens: int | None = runtime(None, ge=1)
    """Tokens per forward and backward pass of one process of a training, padding included."""
    gradient_checkpointing: bool | None = runtime(None)
    """Whether a training recomputes activations in the backward pass: less memory, more time."""
    replicas: int | None = runtime(None, ge=1)
    """Engines of a generation, or copies of a scorer's model."""


class StagePlacementSection(Section):
    """Where some stages run. A word is short for `pool`: {reference: scoring}."""

    pool: str | None = runtime(None)
    """The pool whose devices they use; by default the strategy's choice."""
    layout: LayoutSection = runtime(LayoutSection())
    """Parallel layout of each stage on them."""

    @model_validator(mode="before")
    @classmethod
    def _read_word(cls, value: Any) -> Any:
        return {"pool": value} if isinstance(value, str) else value


class ExpectedRoleSection(Section):
    """Expected times of the stages of one role."""

    seconds: list[float] = runtime(min_length=1)
    """Expected seconds of the stage in each iteration, the earliest first; the last one applies to all later ones."""
    first: int = runtime(0, ge=0)
    """The iteration that the first of `seconds` is for."""
    error: float = runtime(ge=0)
    """One standard deviation of the times, as a share of them."""
    basis: Literal["measured", "scaled", "analytic"] = runtime()
    """Basis of the prediction: runs of matching stages, of others, or data sheets only."""

    def seconds_of(self, iteration: int | None) -> float:
        """Expected seconds of the stage in an iteration."""
        number = max(0, (iteration or 0) - self.first)
        return self.seconds[min(number, len(self.seconds) - 1)]


class ExpectationSection(Section):
    """Expected times of a plan, written by `pipeline plan search`; optional."""

    chosen: str = runtime()
    """found, or the name of the strategy that the search could not beat."""
    seconds: float = runtime(ge=0)
    """Expected seconds of the run."""
    error: float = runtime(ge=0)
    """One standard deviation of `seconds`, in seconds."""
    iterations: int = runtime(ge=0)
    """Number of iterations of the run."""
    lag: int = runtime(0, ge=0)
    """The lag it was planned with."""
    devices: str = runtime()
    """The devices it was planned for."""
    seed: int = runtime(0, ge=0)
    """Seed of the search."""
    config: str = runtime()
    """Digest of the config fields that determine the run's results."""
    plan: str = runtime()
    """Digest of the rest of this section: if you change keys of it later, the expectations no longer apply."""
    stages: dict[str, ExpectedRoleSection] = runtime({})
    """Expected times by role."""


class PlacementSection(Section):
    """Where and when stages run; none of it changes what they publish. A word is short for `strategy`, and
    `placement: FILE.yaml` reads the section from a file."""

    strategy: Strategy = runtime("flattening")
    """flattening: every stage on all devices, one after another; interleaving: independent stages at the same time, on
    parts of the devices; separation: generation and scoring on one pool, training on another; async: the same, with the
    generation of an iteration during the training of the previous one, for runs with a `lag`; colocated: engine and
    trainer alternate on the same devices, one sleeping while the other works."""
    streaming: bool = runtime(False)
    """Start a scoring on the shards that its generation has finished so far, if there are devices for it."""
    pools: dict[str, PoolSection] = runtime({})
    """Devices by names of your choice: {generation: [0, 1], training: 2}. Pools must not overlap. A stage is in the
    pool that its entry in `stages` names, else in the one named like its kind (generation, scoring, training); without
    a pool named scoring, scorers are in that of generation."""
    stages: dict[str, StagePlacementSection] = runtime({})
    """Pool and layout of some stages: {reference: {pool: scoring}, generation: {layout: {tp: 2}}}. A key is generation,
    scoring, training or light, the role of a stage in its iteration, its name, or a pattern with *. If several entries
    match a stage, the later one wins, key by key."""
    expected: ExpectationSection | None = runtime(None)
    """The times that `pipeline plan search` expects, which the report compares with the measured ones."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        owners: dict[int, str] = {}
        for name, pool in self.pools.items():
            for device in pool.devices if isinstance(pool.devices, list) else []:
                if (other := owners.setdefault(device, name)) != name:
                    raise ValueError(
                        f"pools.{other} and pools.{name} both have device {device}. A device is in one pool: take it "
                        "out of one of them."
                    )
        for key, entry in self.stages.items():
            if entry.pool is not None and entry.pool not in self.pools:
                raise ValueError(
                    f"stages.{key}.pool is {entry.pool!r}, which is not a pool.{did_you_mean(entry.pool, self.pools)} "
                    f"Known: {', '.join(self.pools) or 'none; add it to `pools`'}."
                )
        return self

    @property
    def digest(self) -> str:
        """Digest of the plan, without its expected times."""
        return digest(self.model_dump(mode="json", exclude={"expected"}, exclude_defaults=True))

    @property
    def expectation(self) -> ExpectationSection | None:
        """The expected times of the plan; None if there are none, or the plan has been changed since."""
        return self.expected if self.expected is not None and self.expected.plan == self.digest else None
