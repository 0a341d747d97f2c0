"""Checks a run's inputs, models and devices before the first stage starts."""

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from contracts.declaration import ModelUse
from contracts.errors import UserError
from contracts.files import exists_or_matches
from contracts.models import ModelInfo
from contracts.template import ChatFields, ChatTemplate
from contracts.tokenizer import require_tokenizer
from pipelines.config.executor import LOCAL_KINDS
from pipelines.config.run import RunConfig
from pipelines.environments.launch import launch_command, probe_versions
from pipelines.environments.locked import TRACKING
from pipelines.graph import Graph, Node
from pipelines.planning.cluster import Cluster
from pipelines.planning.estimates import context_uses
from pipelines.progress import tracked
from pipelines.text import plural


def require_possible(graph: Graph, cluster: Cluster, *, without_weights: bool = False) -> None:
    """Refuse a placed graph that cannot run: an input does not exist, a layout takes more GPUs than there are, or a
    model does not meet its requirements.

    Args:
        without_weights: as for `model_mistakes`.

    Raises:
        UserError: the first mistake found.
    """
    models = itertools.chain(model_mistakes(graph, without_weights=without_weights), context_mistakes(graph))
    for mistake in itertools.chain(input_mistakes(graph), device_mistakes(graph, cluster), models):
        raise mistake


def check_environments(graph: Graph, config: RunConfig) -> None:
    """Raise UserError if an environment that a stage or a tracker needs is missing or cannot run it."""
    for name in sorted({node.environment for node in graph.nodes.values()}):
        probe_versions(config.environments.of(name), name)
    if config.tracking.chosen:
        launch_command(config.environments.tracking, TRACKING, [])


def input_mistakes(graph: Graph) -> Iterator[UserError]:
    """Yield an error for every external input and every function of the user that does not exist, once each."""
    seen = set()
    functions = set()
    for node in tracked(graph.nodes.values(), "checking what the stages read"):
        for path in node.external_inputs(graph):
            if path in seen:
                continue
            seen.add(path)
            if not str(path).startswith("hf:") and not exists_or_matches(path):
                yield UserError(
                    f"stage {node.name}: input {path} does not exist. Give a path that does, or hf:ORG/NAME."
                )
        try:
            node.config.source_files()
        except UserError as error:
            if str(error) not in functions:
                functions.add(str(error))
                yield error


def model_mistakes(graph: Graph, *, without_weights: bool = False) -> Iterator[UserError]:
    """Yield an error for every requirement that an external model does not meet, once each.

    Args:
        graph: the graph of the run.
        without_weights: for models without weights check only their shape, for runs that are only simulated.
    """
    known = set()
    for node in tracked(graph.nodes.values(), "checking the models"):
        for requirement in _requirements(node, graph, without_weights):
            try:
                requirement()
            except UserError as error:
                if str(error) not in known:
                    known.add(str(error))
                    yield error


def context_mistakes(graph: Graph) -> Iterator[UserError]:
    """Yield an error for every stage whose sequences exceed the context of a model made in the run, once each. External
    models are checked by `model_mistakes`."""
    found = {use.keys: use.context for use in context_uses(graph) if use.is_made and use.tokens > use.context}
    for keys, context in found.items():
        yield UserError(f"{keys}: more than the policy's context of {context} tokens. Lower them to that together.")


def device_mistakes(graph: Graph, cluster: Cluster) -> Iterator[UserError]:
    """Yield an error for every stage of a placed graph whose layout takes more GPUs than it has.

    Where stages have parts of the machine, this is refused during placement. Where each has all of it, a layout for
    another machine can be placed, and is found here.
    """
    for node in graph.nodes.values():
        if not cluster.gpus or cluster.is_divided or cluster.executor.entry(node).kind not in LOCAL_KINDS:
            continue
        layout = node.stage.layout(node.config)
        wanted = layout.processes * max(1, node.gpus)
        if node.stage.uses_devices(node.config) and wanted > cluster.gpus:
            what = (
                f"parallel ({layout.shown})" if layout.shown else layout.network_keys or f"replicas={layout.processes}"
            )
            each = f" ({layout.processes} processes of {node.gpus})" if layout.processes > 1 and node.gpus > 1 else ""
            yield UserError(
                f"stage {node.name}: {what} takes {plural(wanted, 'GPU')}{each}, but there are {cluster.gpus}. Set "
                f"{_keys_of(node)} to fewer, or use more GPUs."
            )


def _keys_of(node: Node) -> str:
    if node.workload == "training":
        return "dp, tp, pp or sp of its `parallel`"
    return "tensor_parallel, servers or replicas" if node.workload == "generation" else "replicas"


def _requirements(node: Node, graph: Graph, without_weights: bool) -> Iterator[Callable[[], object]]:
    """The requirements of a node's existing external models, as functions that raise UserError."""
    for use in node.stage.models(node.config):
        only_shape = without_weights and not any(use.path.glob("*.safetensors"))
        if graph.producer_name(use.path) is None and use.path.exists() and not only_shape:
            try:
                model = ModelInfo.read(use.path)
            except UserError:
                yield functools.partial(ModelInfo.read, use.path)  # raises the error again
                continue
            if isinstance(node.config, ChatFields) and node.config.chat_template_kwargs:
                yield functools.partial(ChatTemplate, use.path, node.config.chat_template_kwargs)
            if model.has_tokenizer:
                yield functools.partial(require_tokenizer, use.path)
            yield from (functools.partial(check, model) for check in use.checks)
        yield from layout_requirements(use, graph)


def layout_requirements(use: ModelUse, graph: Graph) -> Iterator[Callable[[], object]]:
    """The requirements of a stage's layout on a model's layers, if there is a config.json."""
    start = origin_of(use.path, graph)
    if use.check_architecture is not None and (start / "config.json").is_file():
        yield functools.partial(use.check_architecture, start)


def origin_of(model: Path, graph: Graph) -> Path:
    """The external model that a model is trained from, through all stages of the run; it has the same layers."""
    return graph.origin(model)[0]
