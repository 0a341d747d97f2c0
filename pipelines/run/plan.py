"""Turns a command line into a run's config and its placed graph."""

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.config.load import load_run_config
from pipelines.config.run import RunConfig
from pipelines.environments.launch import EnvironmentConfig
from pipelines.graph import Graph
from pipelines.planning.cluster import Cluster, cluster_of
from pipelines.planning.entries import choose_variant
from pipelines.planning.hub import Commits, HubResolver
from pipelines.planning.iterations import curriculum_beyond_run, lag_beyond_run, require_iterations
from pipelines.planning.placement import placed_graph
from pipelines.run.directory import dated, recorded_commits


@dataclass(frozen=True)
class Plan:
    """A run's resolved config and its graph."""

    source: str
    config: RunConfig
    """The resolved config of the whole run: with its date, shared settings filled in, and local paths of models."""
    graph: Graph
    iterations: int
    commits: Commits | None = None
    """Commits that names on the Hub resolve to; None if the run is older than that record."""

    @property
    def cluster(self) -> Cluster:
        """The devices of this machine and of the config's scheduler."""
        return cluster_of(self.config)

    @property
    def parallel(self) -> int:
        """Maximum number of stages that run at once."""
        return self.cluster.parallel

    @property
    def warnings(self) -> list[str]:
        """Settings that are allowed but probably not intended."""
        found = (lag_beyond_run(self.graph), curriculum_beyond_run(self.config, self.iterations))
        return [warning for warning in found if warning is not None]

    @property
    def environments(self) -> list[str]:
        """The environments that the stages need, by name."""
        return sorted({node.environment for node in self.graph.nodes.values()})

    def environment(self, name: str) -> EnvironmentConfig:
        """The config of an environment."""
        return self.config.environments.of(name)


def plan_run(
    source: str,
    overrides: list[str],
    iterations: int | None,
    *,
    download: bool,
    cluster: Callable[[RunConfig], Cluster] = cluster_of,
) -> Plan:
    """Load a configuration and place the stages that it asks for.

    Args:
        source: the file, or the name of a recipe.
        iterations: value of --iters.
        download: whether to download models from the Hub; otherwise those in the local cache are used.
        cluster: returns the devices that the stages are placed on.

    Raises:
        UserError: the configuration or the command line is wrong.
    """
    config, wanted, commits = read_run(source, overrides, iterations, download=download)
    return Plan(source, config, placed_graph(config, wanted, cluster(config)), wanted, commits)


def read_run(
    source: str, overrides: list[str], iterations: int | None, *, download: bool
) -> tuple[RunConfig, int, Commits | None]:
    """Load the config, the number of iterations, and the commits of names on the Hub, without placing stages.

    Raises:
        UserError: the configuration or the command line is wrong.
    """
    config = dated(load_run_config(source, overrides))
    wanted = require_iterations(config, iterations)
    choose_variant(config.executor)
    hub = HubResolver(recorded_commits(config), download=download)
    return hub.resolve(config), wanted, hub.commits
