"""What all kinds of scorers have in common: settings, and what stage, driver and `doctor` ask of them. No torch.

A kind is one file in this folder with two classes: its settings, which stand in a run's section `scorers`, and the
config of its stage, which adds what it reads. docs/extending.md shows how to add one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from contracts.artifacts import Artifact
from contracts.config import Role, Section, StageConfig, identity, input_path, runtime
from contracts.declaration import ModelUse, Workload
from contracts.errors import UserError
from contracts.model_size import Size
from contracts.models import ModelInfo
from contracts.outlook import AnswerStats
from contracts.preflight import Finding, Inspected
from contracts.records import ROLLOUTS, Rollout
from contracts.template import ChatFields, TemplateSettings

if TYPE_CHECKING:
    from modeling.inspect import Renders
    from modeling.loading import LoadedAs

FORMER_FIELDS = {
    "function": None, "opponents": None, "dtype": "auto", "max_length": None, "missing_eos_penalty": None,
    "batch_tokens": 16384,
}  # fmt: skip
"""Of the time when all kinds had the fields of all: with these their stage keys stay what they were."""


CPU_TOKENS = 1024
"""Tokens of a forward pass on a CPU, where larger ones are no faster and leave its caches."""
NO_ANSWER = "no_answer"
"""Reason in the drop ledger: the prompt has no `answer`, by which its completions would be judged."""

MOST_SHOWN = 300
"""Characters of a scorer's settings in a message."""
ANSWER_FIX = (
    "Name the column that holds it where the prompts are imported (answer_column=COLUMN; in a run "
    "prompts.train.answer_column and prompts.heldout.answer_column), take another kind"
)


@dataclass(frozen=True)
class Opening:
    """What a scorer is opened with, besides its settings."""

    state: Path
    """A folder that outlives a kill (`Publication.state`)."""
    samples: Callable[[], float]
    """The stage's number of samples; without a limit as long as it is not known."""
    shard: Callable[[], str] = str
    """The name of the shard that is being judged."""


class ScorerSettings(Section):
    """Settings that every kind of scorer has."""

    kind: str = identity()
    """How answers are judged: the name of a file in annotation/scorers/."""
    max_dropped: float = identity(0.1, ge=0, le=1)
    """Stop when a larger share of the completions is dropped."""
    fail_on_error: float = identity(0.0, ge=0, lt=1)
    """Share of the completions whose scoring may fail (an exception, a score that is not finite); they are dropped and
    counted. 0: the first failure stops the stage."""
    environment: str = runtime("annotation")
    """Environment of the scorer in a run: annotation, generation or training, or the name of one in environments.own.
    By default a scorer with engine=vllm uses that of generation."""

    opened_by: ClassVar[str]
    """`module:function`, called with the config and an `Opening`; returns an `annotation.samples.Scorer`."""
    workload: ClassVar[Workload] = "light"
    """How its stage is scheduled."""
    renders: ClassVar[bool] = False
    """Whether it renders conversations by the chat template of its model."""
    compares: ClassVar[bool] = False
    """Whether it compares the answers to a prompt, of which there must be two then; else it judges them singly."""
    follows_rollouts: ClassVar[bool] = True
    """Whether it can judge rollouts while they are being made."""
    trained_as: ClassVar[str] = ""
    """The `reward_model.training.kind` that trains its model; empty: none does."""
    starts_critic: ClassVar[bool] = False
    """Whether a critic can start from its model."""
    reads_tokens: ClassVar[bool] = False
    """Whether it judges token by token, reading the stored ids."""
    rewards_tokens: ClassVar[bool] = False
    """Whether it always gives a reward for each token."""
    can_reward_tokens: ClassVar[bool] = False
    """Whether it may give one."""
    places_rewards: ClassVar[bool] = False
    """Whether it finds the policy's tokens in their text, for which it needs the policy's tokenizer."""
    keyed_with_former_fields: ClassVar[bool] = False
    """See `FORMER_FIELDS`."""

    @property
    def runs_in(self) -> str:
        """The environment that its stage runs in, in a run."""
        return self.environment

    @property
    def parts(self) -> list[str]:
        """Names of the other scorers whose scores it reads."""
        return []

    @property
    def ensemble(self) -> list[str]:
        """Those of them that judge the same thing, so that their spread says how uncertain the score is."""
        return []

    @property
    def standardised(self) -> list[str]:
        """Those of them whose scores of the initial policy's held-out answers it reads as well."""
        return []

    @property
    def replicas_of_shards(self) -> int:
        """Processes that share the shards."""
        return 1

    @property
    def processes(self) -> int:
        """All its processes."""
        return self.replicas_of_shards

    @property
    def model_path(self) -> Path | None:
        """Its model."""
        return None

    @property
    def shown(self) -> str:
        """What judges, for messages."""
        return self.kind

    def examine(self) -> None:
        """Check what can be checked without opening it.

        Raises:
            UserError: it cannot judge.
        """

    def facts_of(self, rollouts: Artifact) -> dict[str, str]:
        """Facts for the manifest about the rollouts as this scorer reads them.

        Raises:
            UserError: it cannot judge these.
        """
        return {}

    def summary(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Facts for the manifest, from the counts of all shards (`Scorer.counts`)."""
        return {}

    @property
    def reads_answer(self) -> bool:
        """Whether it judges by the prompt's known `answer`, and cannot do without one."""
        return False

    def fixes(self, unread: str) -> dict[str, str]:
        """What to do about what was dropped, by reason; goes on with "or raise max_dropped".

        Args:
            unread: what a judge has said that is no judgement (`Scorer.unread`).
        """
        return {NO_ANSWER: f"{self.needs_answer}, of which there is none. {ANSWER_FIX},"} if self.reads_answer else {}

    @property
    def needs_answer(self) -> str:
        """The beginning of what is said where prompts have no answer."""
        return f"kind={self.kind} judges by the prompt's known `answer`"

    def preflight(self, stage: Inspected) -> Iterator[Finding]:
        """What it would refuse, in its environment, before a run begins."""
        return iter(())

    def models(self, rollouts: Path) -> tuple[ModelUse, ...]:
        """The models that it reads."""
        return ()

    def libraries(self) -> tuple[str, ...]:
        """Packages that its environment must have."""
        return ()

    def memory(self, size: Size, answers: AnswerStats | None, *, on_gpu: bool) -> dict[str, int]:
        """Bytes that one process takes for a model of this size, by what for."""
        return {}


class RewardScorerSettings(ScorerSettings):
    """Settings of scorers that give rewards."""

    missing_eos_penalty: float | None = identity(None, ge=0)
    """Subtracted from the score of truncated responses."""


class WorkerSettings(RewardScorerSettings):
    """Settings of scorers that judge in processes of their own, which may be killed."""

    seconds_per_sample: float | None = runtime(None, gt=0)
    """Time limit for scoring one completion. After it the process is killed, with all its children, and the completion
    counts as failed. By default executor.stall_seconds of a run."""
    replicas: int = runtime(1, ge=1)
    """Processes that share the completions."""

    opened_by: ClassVar[str] = "annotation.workers.rule:Rule"
    calls: ClassVar[str]
    """`module:function` of what judges; annotation/workers/worker.py says how it is called."""
    further_libraries: ClassVar[tuple[str, ...]] = ()
    """Libraries that decide its judgement (`StageConfig.further_libraries`)."""

    @property
    def processes(self) -> int:
        """Which judge, of one job."""
        return self.replicas

    def libraries(self) -> tuple[str, ...]:
        """Those that it judges with."""
        return self.further_libraries

    def preflight(self, stage: Inspected) -> Iterator[Finding]:
        """That its libraries are installed."""
        if missing := self.missing_libraries():
            yield Finding("error", missing)

    def examine(self) -> None:
        """That its libraries are installed."""
        if missing := self.missing_libraries():
            raise UserError(missing)

    def missing_libraries(self) -> str | None:
        """What is said where one is not installed here."""
        for name in self.further_libraries:
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:
                return (
                    f"kind={self.kind} needs {name}, which this environment lacks. Install it, or use the locked one."
                )
        return None

    @property
    def called(self) -> str:
        """What judges."""
        return self.calls

    @property
    def title(self) -> str:
        """What judges, for messages about a judgement: the kind, with what it was given that is no default."""
        fields = type(self).model_fields
        shown = ", ".join(
            f"{name}={value if isinstance(value, str) and value.isprintable() else repr(value)}"
            for name, value in self.keywords.items()
            if name in fields and value != fields[name].get_default(call_default_factory=True)
        )
        if len(shown) > MOST_SHOWN:
            shown = f"{shown[:MOST_SHOWN]}..."
        return f"kind={self.kind}" + (f" ({shown})" if shown else "")

    @property
    def keywords(self) -> dict[str, Any]:
        """Its further keyword arguments: the fields that only this kind has."""
        others = WorkerSettings.model_fields.keys() | ScoreConfig.model_fields.keys()
        return {name: getattr(self, name) for name in type(self).model_fields if name not in others}

    @property
    def read(self) -> list[Path] | None:
        """Paths of the user's that it reads."""
        return None

    @property
    def at_once(self) -> int:
        """Answers of a call, if it takes many."""
        return 1

    @property
    def checked_twice(self) -> int:
        """Answers of each shard that are judged a second time, which must give the same."""
        return 0


class ModelSettings(ScorerSettings):
    """Settings of scorers with a model of their own."""

    model: Path | None = input_path(None)
    """Directory of the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = identity("auto")
    """Number format of the model; auto: bfloat16 on a GPU, float32 on a CPU."""
    max_length: int | None = identity(None, ge=1)
    """Longer inputs (in tokens) are dropped and counted, never truncated; by default the model's context."""
    batch_tokens: int = identity(16384, ge=1)
    """Maximum tokens per forward pass. On a CPU it takes 1024, which fit the caches, unless the responses to one prompt
    have more."""
    replicas: int = runtime(1, ge=1)
    """Processes that share the shards, one device each."""

    workload: ClassVar[Workload] = "scoring"
    keyed_with_former_fields: ClassVar[bool] = True
    opened_by: ClassVar[str] = "annotation.models.loading:open_model"
    reader: ClassVar[str]
    """`module:class` of what reads the model, called with the config and the largest number of tokens of an input."""
    checks: ClassVar[tuple[Callable[[ModelInfo], None], ...]] = ()
    """What the model must be."""
    as_classifier: ClassVar[bool] = False
    """Whether it is loaded with a classification head for sequences."""

    @property
    def replicas_of_shards(self) -> int:
        """One device each."""
        return self.replicas

    @property
    def model_path(self) -> Path | None:
        """The directory."""
        return self.model

    @property
    def shown(self) -> str:
        """The model's directory."""
        return str(self.model)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest input."""
        assert self.model is not None
        return self.max_length or ModelInfo.read(self.model).context_length

    def examine(self) -> None:
        """That the model is one that it can read."""
        assert self.model is not None
        info = ModelInfo.read(self.model)
        for check in self.checks:
            check(info)
        if self.max_length is not None:
            info.require_length(self.max_length, "max_length")

    def preflight(self, stage: Inspected) -> Iterator[Finding]:
        """The model, and the prompts as its template renders them."""
        if self.model is None or not (self.model / "config.json").is_file():
            return
        from modeling.inspect import examine_model  # torch and transformers are not loaded for rules alone
        from modeling.loading import check_weights

        renders: Renders = ("comparisons" if self.compares else "answers") if self.renders else "nothing"
        yield from examine_model(stage, self.model, renders)
        check_weights(self.model, self.loaded_as())

    def loaded_as(self) -> "LoadedAs":
        """What the model is loaded as."""
        return "classifier" if self.as_classifier else "causal"

    def models(self, rollouts: Path) -> tuple[ModelUse, ...]:
        """Its own, which is given token ids where it reads no text."""
        if self.model is None:
            return ()
        return (ModelUse(self.model, self.checks, ids_of=rollouts if self.reads_tokens else None),)

    def libraries(self) -> tuple[str, ...]:
        """Those that load a model."""
        return ("torch", "transformers")

    def memory(self, size: Size, answers: AnswerStats | None, *, on_gpu: bool) -> dict[str, int]:
        """Weights a·P, and one layer's work on N = batch_tokens tokens (on a CPU fewer) without gradients: N · (16 h +
        a · (2 (q + k) + 3 i))."""
        number = self.bytes_per_number(on_gpu=on_gpu)
        tokens = self.tokens_at_once(answers, on_gpu=on_gpu)
        wide = size.query_width + size.key_width
        layer = 16 * size.hidden + number * (2 * wide + 3 * size.intermediate)
        return {"weights": size.parameters * number, "activations": tokens * layer}

    def bytes_per_number(self, *, on_gpu: bool) -> int:
        """Of its number format."""
        return {"float32": 4, "bfloat16": 2}.get(self.dtype, 2 if on_gpu else 4)

    def tokens_at_once(self, answers: AnswerStats | None, *, on_gpu: bool) -> int:
        """Most tokens of a forward pass: on a CPU no more than fit its caches, but a prompt with all its answers."""
        if answers is None:
            return self.batch_tokens
        together, everything = self.tokens_of(answers)
        most = self.batch_tokens if on_gpu else min(self.batch_tokens, max(CPU_TOKENS, together))
        return min(most, everything)

    def tokens_of(self, answers: AnswerStats) -> tuple[int, int]:
        """Tokens of what is computed together of a prompt, at most, and of all."""
        return answers.longest_prompt + answers.k * answers.longest_answer, answers.count * answers.longest


class ScoreConfig(ScorerSettings, StageConfig):
    """Judge every completion with one scorer."""

    stage: ClassVar[str] = "score"
    code_version: ClassVar[int] = 1

    rollouts: Path = input_path()
    """Published rollouts."""
    pairs: Path | None = input_path(None)
    """Published pairs: score only the completions that occur in them."""
    name: str = identity("reward", min_length=1)
    """Name of the scorer, under which its scores are reported."""
    reasons: Path | None = runtime(None)
    """File to which {"prompt_id", "sample", "reason"} of each completion that gets no score is appended, as JSONL."""

    @classmethod
    def variants(cls) -> Mapping[str, type[Section]]:
        """One for each kind of scorer."""
        from annotation.scorers import CONFIGS

        return CONFIGS if cls is ScoreConfig else {}

    def select(self, role: Role) -> dict[str, Any]:
        """The fields of one role, with those that kinds had before each had its own."""
        chosen = super().select(role)
        return {**FORMER_FIELDS, **chosen} if role is Role.IDENTITY and self.keyed_with_former_fields else chosen


class ModelScoreConfig(ModelSettings, ScoreConfig):
    """Judge every completion with a model."""

    code_version: ClassVar[int] = 3

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.model is None:
            raise ValueError(f"kind={self.kind} needs model=DIRECTORY.")
        return self


class ChatModelSettings(ModelSettings, TemplateSettings):
    """Settings of scorers whose model reads conversations in its own chat template."""

    renders: ClassVar[bool] = True


class ChatScoreConfig(ChatModelSettings, ChatFields, ModelScoreConfig):
    """Judge every completion with a model that reads conversations."""


class ComparingSettings(ScorerSettings):
    """Settings of scorers that compare the answers to a prompt."""

    opponents: int | None = identity(None, ge=1)
    """Number of responses that each is compared with; all others to the same prompt by default, which takes K (K - 1)
    forward passes or requests."""

    compares: ClassVar[bool] = True

    def summary(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """`consistency`: the share of the comparisons that come out the same in both orders."""
        share = counts["consistent"] / counts["comparisons"] if counts.get("comparisons") else None
        return {**super().summary(counts), "consistency": share}


class ComparingConfig(ComparingSettings, ScoreConfig):
    """Judge every completion by comparisons with others."""

    against: Path | None = input_path(None)
    """Published rollouts whose responses to the same prompt each response is compared with, instead of with each
    other."""

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.pairs is not None:
            raise ValueError(
                f"kind={self.kind} compares all answers to a prompt, not only those in pairs: leave pairs out."
            )
        return self

    def facts_of(self, rollouts: Artifact) -> dict[str, str]:
        """Whose answers the samples are compared with, where these are not their own.

        Raises:
            UserError: there is nothing to compare them with.
        """
        if self.against is not None:
            return {"against": Artifact.open(self.against, ROLLOUTS).manifest.digest}
        if all(len(rollout.completions) < 2 for rollout in rollouts.rows(Rollout)):
            raise UserError(
                f"kind={self.kind} compares the answers to a prompt with each other, but {rollouts.path} holds at most "
                "one per prompt. Generate with k=2 or more, or set against=ROLLOUTS to compare with another policy's "
                "answers."
            )
        return {}
