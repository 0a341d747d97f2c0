"""From the command line to a run's placed graph."""

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.config.load import load_run_config
from pipelines.config.run import RunConfig
from pipelines.environments.launch import EnvironmentConfig
from pipelines.graph import Graph
from pipelines.planning.cluster import Cluster, cluster_of
from pipelines.planning.entries import choose_variant
from pipelines.planning.hub import Commits, OnHub
from pipelines.planning.iterations import curriculum_beyond_run, lag_beyond_run, require_iterations
from pipelines.planning.placement import placed_graph
from pipelines.run.directory import dated, recorded_commits


@dataclass(frozen=True)
class Plan:
    """A run's resolved config and its graph."""

    source: str
    config: RunConfig
    """What holds for all of it: with its date, with what sections take from each other, and models where they are."""
    graph: Graph
    iterations: int
    commits: Commits | None = None
    """What the names of things on the Hub stand for; None: the run is older than the record of that."""

    @property
    def cluster(self) -> Cluster:
        """What this machine, and the scheduler of its config, give it."""
        return cluster_of(self.config)

    @property
    def parallel(self) -> int:
        """Stages at once."""
        return self.cluster.parallel

    @property
    def warnings(self) -> list[str]:
        """What is allowed, and hardly wanted."""
        found = (lag_beyond_run(self.graph), curriculum_beyond_run(self.config, self.iterations))
        return [warning for warning in found if warning is not None]

    @property
    def environments(self) -> list[str]:
        """The kinds of environments that the stages need."""
        return sorted({node.environment for node in self.graph.nodes.values()})

    def environment(self, name: str) -> EnvironmentConfig:
        """What the config says of an environment."""
        return self.config.environments.of(name)


def plan_run(
    source: str,
    overrides: list[str],
    iterations: int | None,
    *,
    download: bool,
    cluster: Callable[[RunConfig], Cluster] = cluster_of,
) -> Plan:
    """Read a configuration, and say which stages it asks for.

    Args:
        source: the file, or the name of a recipe.
        iterations: what --iters says.
        download: get the models that are on the Hub; else those are used that are in the local cache.
        cluster: what the stages are placed on.

    Raises:
        UserError: anything is wrong with it.
    """
    config, wanted, commits = read_run(source, overrides, iterations, download=download)
    return Plan(source, config, placed_graph(config, wanted, cluster(config)), wanted, commits)


def read_run(
    source: str, overrides: list[str], iterations: int | None, *, download: bool
) -> tuple[RunConfig, int, Commits | None]:
    """The same config, how many iterations are wanted of it, and what names on the Hub stand for; nothing is placed.

    Raises:
        UserError: anything is wrong with it.
    """
    config = dated(load_run_config(source, overrides))
    wanted = require_iterations(config, iterations)
    choose_variant(config.executor)
    hub = OnHub(recorded_commits(config), download=download)
    return hub.locate(config), wanted, hub.commits
