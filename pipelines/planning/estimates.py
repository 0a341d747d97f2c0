"""How much memory and disk the stages of a graph take, before they run: by what their declarations say."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from contracts.model_size import Size
from contracts.outlook import AnswerStats, Memory, PairStats, RowStats, measure
from contracts.stage import MINIMUM_FREE
from pipelines.graph import Graph, Node
from pipelines.planning.sizes import read_size


class GraphOutlook:
    """What a graph's stages say of what they make (`contracts.outlook.Outlook`)."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def size_of(self, model: Path) -> Size | None:
        """The measures of a model: what a stage of the graph makes has those of the model that it starts from."""
        start, becomes_classifier = self.graph.origin(model)
        size = self.graph.known(("size", start), lambda: self._size(start))
        return size.as_classifier() if size and becomes_classifier else size

    def _size(self, start: Path) -> Size | None:
        node = self.graph.maker(start)
        return read_size(start) if node is None else node.stage.size(node.config)

    def rows_of(self, path: Path, split: str = "train") -> RowStats | None:
        """Rows of prompts or demonstrations, before they are made; None where only the Hub knows."""
        return self.graph.known(("rows", path, split), lambda: self._rows(path, split))

    def _rows(self, path: Path, split: str) -> RowStats | None:
        node = self.graph.maker(path)
        return measure(path, split) if node is None else node.stage.rows(node.config, path, self) or measure(path)

    def answers_of(self, path: Path) -> AnswerStats | None:
        """The answers in rollouts, or of which an experience is made."""
        node = self.graph.maker(path)
        return node.stage.answers(node.config, self) if node else None

    def pairs_of(self, path: Path) -> PairStats | None:
        """Preference pairs."""
        node = self.graph.maker(path)
        return node.stage.pairs(node.config, self) if node else None


@dataclass(frozen=True)
class ContextUse:
    """The tokens that a stage asks of its model's context at most."""

    keys: str
    """What asks for them: keys of its config, with their values."""
    tokens: int
    context: int
    """The tokens that the model can take."""
    is_made: bool
    """Whether a stage of the run makes the model."""


def context_uses(graph: Graph) -> Iterator[ContextUse]:
    """What each stage that generates asks of its model's context, where that is known before the run."""
    outlook = GraphOutlook(graph)
    for node in graph.nodes.values():
        tokens, models = node.stage.tokens(node.config), node.stage.models(node.config)
        policy = outlook.size_of(models[0].path) if tokens and models else None
        if tokens is None or policy is None or policy.context is None:
            continue
        prompt, answer = tokens
        keys = f"max_prompt_tokens={prompt} and max_new_tokens={answer}" if prompt else f"max_new_tokens={answer}"
        is_made = graph.owner(models[0].path) is not None
        yield ContextUse(keys, max(prompt, 1) + answer, policy.context, is_made)


def disk_bytes(node: Node, graph: Graph) -> int:
    """Bytes that a stage may need on the disk: what it publishes, and what it keeps while it runs.

    Where the size of its inputs cannot be known, as little as any stage must have (contracts.stage.MINIMUM_FREE).
    """
    published = published_bytes(node, graph)
    return MINIMUM_FREE if published is None else published + scratch_bytes(node, graph)


def published_bytes(node: Node, graph: Graph) -> int | None:
    """Bytes that a stage publishes, rather too many than too few; None where that cannot be known."""
    return node.stage.published_bytes(node.config, GraphOutlook(graph))


def scratch_bytes(node: Node, graph: Graph) -> int:
    """Bytes that a stage needs while it runs and gives back."""
    return node.stage.scratch_bytes(node.config, GraphOutlook(graph))


def memory(node: Node, graph: Graph, *, on_gpu: bool) -> Memory | None:
    """Memory of a stage; None for those that take little, and where the model's size is not known."""
    return node.stage.memory(node.config, GraphOutlook(graph), on_gpu=on_gpu)
