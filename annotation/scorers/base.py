"""Base classes of all scorer kinds: shared settings, and the methods that the stage, the driver and `doctor` call.

A kind is one module in this folder with two classes: its settings, for a run's section `scorers`, and the config of its
stage, which adds the input paths. docs/extending.md shows how to add one. Nothing here needs torch.
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

LEGACY_FIELDS = {
    "function": None, "opponents": None, "dtype": "auto", "max_length": None, "missing_eos_penalty": None,
    "batch_tokens": 16384,
}  # fmt: skip
"""Fields that every kind had in earlier versions. They still enter the stage key with these values, so that keys do not
change."""
CPU_TOKENS = 1024
"""Tokens per forward pass on a CPU; larger passes are no faster there, since they exceed its caches."""
NO_ANSWER = "no_answer"
"""Reason in the drop ledger: the prompt has no `answer` to compare its completions with."""

MAX_SHOWN = 300
"""Maximum length of a scorer's settings in a message, in characters."""
ANSWER_FIX = (
    "Name the column that holds it where the prompts are imported (answer_column=COLUMN; in a run "
    "prompts.train.answer_column and prompts.heldout.answer_column), take another kind"
)


@dataclass(frozen=True)
class Opening:
    """Arguments for opening a scorer, in addition to its config."""

    state: Path
    """A folder that survives a kill (`Publication.state`)."""
    samples: Callable[[], float]
    """Returns the stage's number of samples; infinity while it is not known."""
    shard: Callable[[], str] = str
    """Returns the name of the shard that is being scored."""


class ScorerSettings(Section):
    """Settings that every kind of scorer has."""

    kind: str = identity()
    """How responses are scored: the name of a module in annotation/scorers/."""
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
    """Whether it renders conversations with its model's chat template."""
    compares: ClassVar[bool] = False
    """Whether it compares the answers to a prompt with each other, which takes two or more; if not, it scores each
    answer on its own."""
    follows_rollouts: ClassVar[bool] = True
    """Whether it can score rollouts while they are still being generated."""
    trained_as: ClassVar[str] = ""
    """The `reward_model.training.kind` that trains its model; empty: its model cannot be trained."""
    starts_critic: ClassVar[bool] = False
    """Whether a critic can be initialized from its model."""
    reads_tokens: ClassVar[bool] = False
    """Whether it scores token by token, reading the stored ids."""
    rewards_tokens: ClassVar[bool] = False
    """Whether it always returns a reward for each token."""
    can_reward_tokens: ClassVar[bool] = False
    """Whether it may return a reward for each token."""
    locates_tokens: ClassVar[bool] = False
    """Whether it maps positions in the text to the policy's tokens, which requires the policy's tokenizer."""
    keyed_with_legacy_fields: ClassVar[bool] = False
    """Whether `LEGACY_FIELDS` enter its stage key."""

    @property
    def runs_in(self) -> str:
        """The environment of its stage in a run."""
        return self.environment

    @property
    def components(self) -> list[str]:
        """Names of the other scorers whose scores it reads."""
        return []

    @property
    def ensemble(self) -> list[str]:
        """The `components` that score the same quality, so that their spread measures the uncertainty of the score."""
        return []

    @property
    def standardised(self) -> list[str]:
        """The `components` whose scores of the initial policy's held-out answers it also reads."""
        return []

    @property
    def replicas_of_shards(self) -> int:
        """Processes that share the shards."""
        return 1

    @property
    def processes(self) -> int:
        """Total number of scoring processes."""
        return self.replicas_of_shards

    @property
    def model_path(self) -> Path | None:
        """Directory of its model, if it has one."""
        return None

    @property
    def display_name(self) -> str:
        """The scorer's name in messages."""
        return self.kind

    def check(self) -> None:
        """Check everything that can be checked without opening the scorer.

        Raises:
            UserError: it cannot score.
        """

    def facts_of(self, rollouts: Artifact) -> dict[str, str]:
        """Facts for the manifest about how this scorer reads the rollouts.

        Raises:
            UserError: it cannot score these rollouts.
        """
        return {}

    def summary(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Facts for the manifest, computed from the counts of all shards (`Scorer.counts`)."""
        return {}

    @property
    def reads_answer(self) -> bool:
        """Whether it requires the prompt's known `answer`."""
        return False

    def fixes(self, unread: str) -> dict[str, str]:
        """Advice for the error about too many dropped samples, by reason; the message continues with "or raise
        max_dropped".

        Args:
            unread: description of a judge's reply from which no score could be read (`Scorer.unread`).
        """
        return {NO_ANSWER: f"{self.needs_answer}, and there is none. {ANSWER_FIX},"} if self.reads_answer else {}

    @property
    def needs_answer(self) -> str:
        """The beginning of the message about prompts without an answer."""
        return f"kind={self.kind} needs the prompt's known `answer`"

    def preflight(self, stage: Inspected) -> Iterator[Finding]:
        """Check, in the scorer's environment and before a run begins, for everything that it would refuse."""
        return iter(())

    def models(self, rollouts: Path) -> tuple[ModelUse, ...]:
        """The models that it reads."""
        return ()

    def libraries(self) -> tuple[str, ...]:
        """Packages that its environment must have."""
        return ()

    def memory(self, size: Size, answers: AnswerStats | None, *, on_gpu: bool) -> dict[str, int]:
        """Estimated memory of one process for a model of this size: bytes by purpose."""
        return {}


class RewardScorerSettings(ScorerSettings):
    """Settings of scorers whose scores are rewards."""

    missing_eos_penalty: float | None = identity(None, ge=0)
    """Penalty that is subtracted from the score of truncated responses."""


class WorkerSettings(RewardScorerSettings):
    """Settings of scorers that run in worker processes, which can be killed."""

    seconds_per_sample: float | None = runtime(None, gt=0)
    """Time limit for scoring one completion. After it the process is killed, with all its children, and the completion
    counts as failed. By default executor.stall_seconds of a run."""
    replicas: int = runtime(1, ge=1)
    """Processes that share the completions."""

    opened_by: ClassVar[str] = "annotation.workers.rule:Rule"
    calls: ClassVar[str]
    """`module:function` of the scoring function or class; annotation/workers/worker.py defines how it is called."""
    further_libraries: ClassVar[tuple[str, ...]] = ()
    """Libraries that its scores depend on (`StageConfig.further_libraries`)."""

    @property
    def processes(self) -> int:
        """Number of worker processes; all belong to one job."""
        return self.replicas

    def libraries(self) -> tuple[str, ...]:
        """The libraries that its scores depend on."""
        return self.further_libraries

    def preflight(self, stage: Inspected) -> Iterator[Finding]:
        """Check that its libraries are installed."""
        if missing := self.missing_libraries():
            yield Finding("error", missing)

    def check(self) -> None:
        """Check that its libraries are installed."""
        if missing := self.missing_libraries():
            raise UserError(missing)

    def missing_libraries(self) -> str | None:
        """The message about a library that is not installed in this environment, or None."""
        for name in self.further_libraries:
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:
                return (
                    f"kind={self.kind} needs {name}, which this environment lacks. Install it, or use the locked one."
                )
        return None

    @property
    def target(self) -> str:
        """`module:function` of the scoring function or class."""
        return self.calls

    @property
    def title(self) -> str:
        """The scorer's name in messages about a score: the kind, with the settings that differ from the defaults."""
        fields = type(self).model_fields
        shown = ", ".join(
            f"{name}={value if isinstance(value, str) and value.isprintable() else repr(value)}"
            for name, value in self.keywords.items()
            if name in fields and value != fields[name].get_default(call_default_factory=True)
        )
        if len(shown) > MAX_SHOWN:
            shown = f"{shown[:MAX_SHOWN]}..."
        return f"kind={self.kind}" + (f" ({shown})" if shown else "")

    @property
    def keywords(self) -> dict[str, Any]:
        """Further keyword arguments of the scoring function: the fields that only this kind has."""
        others = WorkerSettings.model_fields.keys() | ScoreConfig.model_fields.keys()
        return {name: getattr(self, name) for name in type(self).model_fields if name not in others}

    @property
    def user_paths(self) -> list[Path] | None:
        """The user's paths that it reads."""
        return None

    @property
    def samples_per_call(self) -> int:
        """Answers per call, if the function takes several."""
        return 1

    @property
    def rechecked(self) -> int:
        """Number of answers per shard that are scored a second time, to check that the score is the same."""
        return 0


class ModelSettings(ScorerSettings):
    """Settings of scorers that load a model."""

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
    keyed_with_legacy_fields: ClassVar[bool] = True
    opened_by: ClassVar[str] = "annotation.models.loading:open_model"
    reader: ClassVar[str]
    """`module:class` of the scorer, called with the config and the maximum number of tokens of an input."""
    checks: ClassVar[tuple[Callable[[ModelInfo], None], ...]] = ()
    """Requirements on the model, each a function that raises a UserError if it is not met."""
    as_classifier: ClassVar[bool] = False
    """Whether the model is loaded as a sequence classifier."""

    @property
    def replicas_of_shards(self) -> int:
        """Processes that share the shards, one device each."""
        return self.replicas

    @property
    def model_path(self) -> Path | None:
        """Directory of the model."""
        return self.model

    @property
    def display_name(self) -> str:
        """The model's directory."""
        return str(self.model)

    @property
    def longest(self) -> int | None:
        """Maximum number of tokens of an input; None: unlimited."""
        assert self.model is not None
        return self.max_length or ModelInfo.read(self.model).context_length

    def check(self) -> None:
        """Check that the model is of a supported type, and that its context holds max_length tokens."""
        assert self.model is not None
        info = ModelInfo.read(self.model)
        for check in self.checks:
            check(info)
        if self.max_length is not None:
            info.require_length(self.max_length, "max_length")

    def preflight(self, stage: Inspected) -> Iterator[Finding]:
        """Check the model, and render the prompts with its chat template."""
        if self.model is None or not (self.model / "config.json").is_file():
            return
        from modeling.inspect import examine_model  # scorers without a model do not load torch and transformers
        from modeling.loading import check_weights

        renders: Renders = ("comparisons" if self.compares else "answers") if self.renders else "nothing"
        yield from examine_model(stage, self.model, renders)
        check_weights(self.model, self.loaded_as())

    def loaded_as(self) -> "LoadedAs":
        """The class of model to load: a causal language model or a classifier."""
        return "classifier" if self.as_classifier else "causal"

    def models(self, rollouts: Path) -> tuple[ModelUse, ...]:
        """Its model; if it reads token ids instead of text, with the rollouts that they are from."""
        if self.model is None:
            return ()
        return (ModelUse(self.model, self.checks, ids_of=rollouts if self.reads_tokens else None),)

    def libraries(self) -> tuple[str, ...]:
        """The libraries that load a model."""
        return ("torch", "transformers")

    def memory(self, size: Size, answers: AnswerStats | None, *, on_gpu: bool) -> dict[str, int]:
        """Weights a·P, and one layer's activations without gradients for N = batch_tokens tokens (fewer on a CPU):
        N · (16 h + a · (2 (q + k) + 3 i)), with a bytes per number."""
        number = self.bytes_per_number(on_gpu=on_gpu)
        tokens = self.tokens_at_once(answers, on_gpu=on_gpu)
        wide = size.query_width + size.key_width
        layer = 16 * size.hidden + number * (2 * wide + 3 * size.intermediate)
        return {"weights": size.parameters * number, "activations": tokens * layer}

    def bytes_per_number(self, *, on_gpu: bool) -> int:
        """Bytes of a number in the model's dtype."""
        return {"float32": 4, "bfloat16": 2}.get(self.dtype, 2 if on_gpu else 4)

    def tokens_at_once(self, answers: AnswerStats | None, *, on_gpu: bool) -> int:
        """Maximum tokens of a forward pass: on a CPU as many as fit its caches, or a prompt with all its answers if
        that is more."""
        if answers is None:
            return self.batch_tokens
        together, everything = self.tokens_of(answers)
        most = self.batch_tokens if on_gpu else min(self.batch_tokens, max(CPU_TOKENS, together))
        return min(most, everything)

    def tokens_of(self, answers: AnswerStats) -> tuple[int, int]:
        """Maximum tokens that are computed together for one prompt, and the tokens of all answers."""
        return answers.longest_prompt + answers.k * answers.longest_answer, answers.count * answers.longest


class ScoreConfig(ScorerSettings, StageConfig):
    """Score every completion with one scorer."""

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
        """The config class of each scorer kind."""
        from annotation.scorers import CONFIGS

        return CONFIGS if cls is ScoreConfig else {}

    def select(self, role: Role) -> dict[str, Any]:
        """The fields of one role; for the stage key, with `LEGACY_FIELDS` where the kind needs them."""
        chosen = super().select(role)
        return {**LEGACY_FIELDS, **chosen} if role is Role.IDENTITY and self.keyed_with_legacy_fields else chosen


class ModelScoreConfig(ModelSettings, ScoreConfig):
    """Score every completion with a model."""

    code_version: ClassVar[int] = 3

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.model is None:
            raise ValueError(f"kind={self.kind} needs model=DIRECTORY.")
        return self


class ChatModelSettings(ModelSettings, TemplateSettings):
    """Settings of scorers whose model reads conversations, rendered with its own chat template."""

    renders: ClassVar[bool] = True


class ChatScoreConfig(ChatModelSettings, ChatFields, ModelScoreConfig):
    """Score every completion with a model that reads conversations."""


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
    """Score every completion by comparisons with others."""

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
        """The digest of the rollouts that the samples are compared with, if `against` is set.

        Raises:
            UserError: there are no answers to compare with.
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
