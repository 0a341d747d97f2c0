"""What can be found wrong before the first stage starts."""

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from annotation.config import ScoreConfig
from contracts.config import StageConfig
from contracts.errors import UserError
from contracts.models import ModelInfo
from contracts.template import ChatFields, ChatTemplate
from contracts.tokenizer import require_tokenizer
from generation.config import GenerationConfig
from pipelines.config.sections import EnvironmentsSection
from pipelines.environments.launch import probe_versions
from pipelines.graph import Graph, Node
from pipelines.progress import tracked
from training.config import RewardConfig, TrainingConfig, ValueHeadConfig
from training.parallel import check_layout


def check_inputs(graph: Graph) -> None:
    """Check every input that no stage of the graph makes: files exist, models are what their use needs.

    Raises:
        UserError: the first mistake found.
    """
    for mistake in itertools.chain(input_mistakes(graph), model_mistakes(graph)):
        raise mistake


def check_environments(graph: Graph, environments: EnvironmentsSection) -> None:
    """Raise UserError when an environment that a stage needs is not there or cannot run it."""
    for name in sorted({node.environment for node in graph.nodes.values()}):
        probe_versions(environments.of(name), name)


def input_mistakes(graph: Graph) -> Iterator[UserError]:
    """Every input from outside of the run, and every function of the user's, that does not exist; each once."""
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
    """Every way in which a model from outside of the run is not what its use needs; each once."""
    known = set()
    for node in tracked(graph.nodes.values(), "checking the models"):
        try:
            requirements = list(_requirements(node, graph))
        except UserError as error:
            requirements = [functools.partial(_raise, error)]
        for require in requirements:
            try:
                require()
            except UserError as error:
                if str(error) not in known:
                    known.add(str(error))
                    yield error


def _requirements(node: Node, graph: Graph) -> Iterator[Callable[[], None]]:
    """What the model that a stage reads has to fulfil, if it exists and comes from outside of the run."""
    config, outside = node.config, [path for path in node.external_inputs(graph) if path.exists()]
    yield from _chat_requirements(config, outside)
    if isinstance(config, GenerationConfig) and config.policy in outside:
        model = ModelInfo.read(config.policy)
        tokens = (config.max_prompt_tokens or 1) + config.max_new_tokens
        yield model.require_causal
        yield functools.partial(model.require_engine, config.engine)
        yield model.require_chat_template
        yield functools.partial(model.require_length, tokens, "prompt and answer together")
    if isinstance(config, ScoreConfig) and config.model in outside:
        model = ModelInfo.read(config.model)
        if config.kind == "reward_model" or (config.kind == "values" and not model.has_value_head):
            yield model.require_one_label
        if config.kind in ("logprobs", "pairwise"):
            yield model.require_causal
        if config.kind in ("reward_model", "pairwise"):
            yield model.require_chat_template
    if isinstance(config, TrainingConfig) and config.model in outside:
        model = ModelInfo.read(config.model)
        yield model.require_classifier_start if node.stage.has_score_head(config) else model.require_causal
        if isinstance(config, RewardConfig) and config.kind == "pairwise":
            yield model.require_chat_template
        yield functools.partial(model.require_length, config.max_length or 1, "max_length")
    if isinstance(config, TrainingConfig):
        start = origin_of(config.model, graph)
        if (start / "config.json").is_file():
            yield functools.partial(check_layout, config.parallel, start)
    if isinstance(config, ValueHeadConfig) and config.model in outside:
        yield ModelInfo.read(config.model).require_causal


def _chat_requirements(config: StageConfig, outside: list[Path]) -> Iterator[Callable[[], None]]:
    """That the model for which a stage renders conversations reads the variables that it is given, and that a model
    which reads the policy's token ids has a tokenizer that is the same everywhere, if it has one."""
    model = getattr(config, "policy", None) or getattr(config, "model", None)
    if model is None or model not in outside:
        return
    if isinstance(config, ChatFields) and config.chat_template_kwargs:
        yield functools.partial(_require_variables, model, config.chat_template_kwargs)
    if ModelInfo.read(model).has_tokenizer:
        yield functools.partial(require_tokenizer, model)


def _require_variables(model: Path, variables: dict[str, Any]) -> None:
    ChatTemplate(model, variables)


def origin_of(model: Path, graph: Graph) -> Path:
    """The model that a model is trained from, through all stages of the run: it has the same layers."""
    return graph.origin(model)[0]


def _raise(error: UserError) -> None:
    raise error
