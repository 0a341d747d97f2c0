"""What can be found wrong before the first stage starts."""

from annotation.config import ScoreConfig
from contracts.errors import UserError
from contracts.models import ModelInfo
from generation.config import GenerationConfig
from pipelines.config import EnvironmentsSection
from pipelines.environments import probe_versions
from pipelines.graph import Graph, Node
from training.config import TrainingConfig


def check_inputs(graph: Graph) -> None:
    """Check every input that no stage of the graph makes: files exist, models are what their use needs.

    Raises:
        UserError: the first mistake found.
    """
    for node in graph.nodes.values():
        for path in node.external_inputs(graph):
            if not str(path).startswith("hf:") and not path.exists():
                raise UserError(
                    f"stage {node.name}: input {path} does not exist. Give a path that does, or hf:ORG/NAME."
                )
        node.config.source_files()  # finds functions that do not exist
        check_model(node, graph)


def check_environments(graph: Graph, environments: EnvironmentsSection) -> None:
    """Raise UserError when an environment that a stage needs is not there or cannot run it."""
    for name in sorted({node.environment for node in graph.nodes.values()}):
        probe_versions(getattr(environments, name), name)


def check_model(node: Node, graph: Graph) -> None:
    """Check the model that a stage reads, if it comes from outside of the run."""
    config, outside = node.config, node.external_inputs(graph)
    if isinstance(config, GenerationConfig) and config.policy in outside:
        model = ModelInfo.read(config.policy)
        model.require_causal()
        model.require_chat_template()
        model.require_length((config.max_prompt_tokens or 1) + config.max_new_tokens, "prompt and answer together")
    if isinstance(config, ScoreConfig) and config.model in outside:
        model = ModelInfo.read(config.model)
        if config.kind == "reward_model":
            model.require_one_label()
            model.require_chat_template()
    if isinstance(config, TrainingConfig) and config.model in outside:
        model = ModelInfo.read(config.model)
        model.require_causal()
        model.require_length(config.max_length or 1, "max_length")
