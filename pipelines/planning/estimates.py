"""Estimates the memory and disk space of the stages of a graph before they run, from their declarations."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from contracts.model_size import Size
from contracts.outlook import AnswerStats, Memory, PairStats, RowStats, measure
from contracts.stage import MINIMUM_FREE
from pipelines.graph import Graph, Node
from pipelines.planning.sizes import read_size


class GraphOutlook:
    """Answers questions about artifacts that do not exist yet, from the stages of a graph
    (`contracts.outlook.Outlook`)."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def size_of(self, model: Path) -> Size | None:
        """The size of a model; one trained in the graph has the size of the model that it starts from."""
        start, becomes_classifier = self.graph.origin(model)
        size = self.graph.cached(("size", start), lambda: self._size(start))
        return size.as_classifier() if size and becomes_classifier else size

    def _size(self, start: Path) -> Size | None:
        node = self.graph.producer(start)
        return read_size(start) if node is None else node.stage.size(node.config)

    def rows_of(self, path: Path, split: str = "train") -> RowStats | None:
        """Estimate of a set of prompts or demonstrations, also before it is made; None if only the Hub knows."""
        return self.graph.cached(("rows", path, split), lambda: self._rows(path, split))

    def _rows(self, path: Path, split: str) -> RowStats | None:
        node = self.graph.producer(path)
        return measure(path, split) if node is None else node.stage.rows(node.config, path, self) or measure(path)

    def answers_of(self, path: Path) -> AnswerStats | None:
        """Estimate of the answers in rollouts, or in the rollouts that an experience is made from."""
        node = self.graph.producer(path)
        return node.stage.answers(node.config, self) if node else None

    def pairs_of(self, path: Path) -> PairStats | None:
        """Estimate of preference pairs."""
        node = self.graph.producer(path)
        return node.stage.pairs(node.config, self) if node else None


@dataclass(frozen=True)
class ContextUse:
    """The maximum sequence length of a stage, and the context of its model, in tokens."""

    keys: str
    """The config keys that set the maximum, with their values."""
    tokens: int
    context: int
    """Maximum number of tokens of the model's context."""
    is_made: bool
    """Whether the model is made in the run."""


def context_uses(graph: Graph) -> Iterator[ContextUse]:
    """The context use of each stage that samples, as far as it is known before the run."""
    outlook = GraphOutlook(graph)
    for node in graph.nodes.values():
        tokens, models = node.stage.tokens(node.config), node.stage.models(node.config)
        policy = outlook.size_of(models[0].path) if tokens and models else None
        if tokens is None or policy is None or policy.context is None:
            continue
        prompt, answer = tokens
        keys = f"max_prompt_tokens={prompt} and max_new_tokens={answer}" if prompt else f"max_new_tokens={answer}"
        is_made = graph.producer_name(models[0].path) is not None
        yield ContextUse(keys, max(prompt, 1) + answer, policy.context, is_made)


def disk_bytes(node: Node, graph: Graph) -> int:
    """Bytes of disk space that a stage may need: its output, and its temporary files.

    If the size of its inputs is not known, the minimum for any stage (contracts.stage.MINIMUM_FREE).
    """
    published = published_bytes(node, graph)
    return MINIMUM_FREE if published is None else published + scratch_bytes(node, graph)


def published_bytes(node: Node, graph: Graph) -> int | None:
    """Bytes that a stage publishes, rounded up; None if unknown."""
    return node.stage.published_bytes(node.config, GraphOutlook(graph))


def scratch_bytes(node: Node, graph: Graph) -> int:
    """Bytes of temporary files, which are deleted when the stage ends."""
    return node.stage.scratch_bytes(node.config, GraphOutlook(graph))


def memory(node: Node, graph: Graph, *, on_gpu: bool) -> Memory | None:
    """Memory of a stage; None if it takes little, or its model's size is not known."""
    return node.stage.memory(node.config, GraphOutlook(graph), on_gpu=on_gpu)
