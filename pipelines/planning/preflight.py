"""Checks of a run's inputs and models before the first stage starts."""

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from contracts.errors import UserError
from contracts.models import ModelInfo
from contracts.template import ChatFields, ChatTemplate
from contracts.tokenizer import require_tokenizer
from pipelines.config.run import RunConfig
from pipelines.environments.launch import launch_command, probe_versions
from pipelines.environments.locked import TRACKING
from pipelines.graph import Graph, Node
from pipelines.progress import tracked


def check_inputs(graph: Graph) -> None:
    """Check every external input: files exist, and models meet their requirements.

    Raises:
        UserError: the first mistake found.
    """
    for mistake in itertools.chain(input_mistakes(graph), model_mistakes(graph)):
        raise mistake


def check_environments(graph: Graph, config: RunConfig) -> None:
    """Raise UserError when an environment that a stage or a tracker needs is not there or cannot run it."""
    for name in sorted({node.environment for node in graph.nodes.values()}):
        probe_versions(config.environments.of(name), name)
    if config.tracking.chosen:
        launch_command(config.environments.tracking, TRACKING, [])


def input_mistakes(graph: Graph) -> Iterator[UserError]:
    """Every external input and every function of the user's that does not exist; each once."""
    seen = set()
    functions = set()
    for node in tracked(graph.nodes.values(), "checking what the stages read"):
        for path in node.external_inputs(graph):
            if path in seen:
                continue
            seen.add(path)
            if not str(path).startswith("hf:") and not path.exists():
                yield UserError(
                    f"stage {node.name}: input {path} does not exist. Give a path that does, or hf:ORG/NAME."
                )
        try:
            node.config.source_files()
        except UserError as error:
            if str(error) not in functions:
                functions.add(str(error))
                yield error


def model_mistakes(graph: Graph) -> Iterator[UserError]:
    """Every requirement that an external model does not meet; each once."""
    known = set()
    for node in tracked(graph.nodes.values(), "checking the models"):
        for requirement in _requirements(node, graph):
            try:
                requirement()
            except UserError as error:
                if str(error) not in known:
                    known.add(str(error))
                    yield error


def _requirements(node: Node, graph: Graph) -> Iterator[Callable[[], object]]:
    """The requirements of a node's external models that exist, as functions that raise UserError."""
    for use in node.stage.models(node.config):
        if graph.owner(use.path) is None and use.path.exists():
            try:
                model = ModelInfo.read(use.path)
            except UserError:
                yield functools.partial(ModelInfo.read, use.path)  # which says what is wrong
                continue
            if isinstance(node.config, ChatFields) and node.config.chat_template_kwargs:
                yield functools.partial(ChatTemplate, use.path, node.config.chat_template_kwargs)
            if model.has_tokenizer:
                yield functools.partial(require_tokenizer, use.path)
            yield from (functools.partial(check, model) for check in use.checks)
        start = origin_of(use.path, graph)
        if use.of_layers is not None and (start / "config.json").is_file():
            yield functools.partial(use.of_layers, start)


def origin_of(model: Path, graph: Graph) -> Path:
    """The external model from which a model is trained, through all stages of the run; it has the same layers."""
    return graph.origin(model)[0]
