"""The data of a report, of bounded size, from which the page, the Markdown and the JSON are rendered.

Times are seconds since 1970, durations are in seconds, lengths in tokens. None means not known.
"""

from typing import Any, Literal

import msgspec

Tone = Literal["good", "bad", "unclear", "plain"]


class Statement(msgspec.Struct, kw_only=True):
    """A question that readers of a report have, and the answer in words."""

    topic: str
    """learning, length, dropped, time, signal, failure or plan."""
    question: str
    answer: str
    """One sentence."""
    details: list[str] = []
    tone: Tone = "plain"


class Correlation(msgspec.Struct, kw_only=True):
    """Correlation of a score with the length of an answer (tokens)."""

    across: float | None
    """Pearson correlation over all answers."""
    within: float | None
    """Pearson correlation within prompts: of the deviations from each prompt's means."""
    freedom: int
    """Degrees of freedom of `within`: scored answers to prompts with several, minus the number of those prompts."""
    slope: float | None
    """Regression slope within prompts: score per additional token."""


class PairFacts(msgspec.Struct, kw_only=True):
    """Statistics of the pairs that were chosen from a set of answers; all but `count` and `strategy` are means."""

    count: int
    chosen_length: float
    rejected_length: float
    chosen_score: float
    rejected_score: float
    margin: float
    strategy: str


class LargestMargin(msgspec.Struct, kw_only=True):
    """The pair with the largest margin, for the first screen; long texts are cut."""

    stage: str
    iteration: int | None
    prompt_id: str
    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    margin: float


class GroupColumns(msgspec.Struct, kw_only=True):
    """Columns that the page sorts and filters by, with one entry for each prompt in the order of the chunks."""

    prompt: list[str] = []
    """Prompt ids."""
    mean: list[float | None] = []
    """Mean score of the prompt's answers by the first scorer; `best` and `worst` are by the same scorer."""
    best: list[float | None] = []
    worst: list[float | None] = []
    margin: list[float | None] = []
    """The largest margin of the prompt's pairs."""
    length: list[float] = []
    """Mean length."""
    longest: list[int] = []
    samples: list[int] = []
    truncated: list[int] = []
    """Number of answers that were cut off."""


class SampleSet(msgspec.Struct, kw_only=True):
    """Answers that one stage has sampled, with their scores and pairs."""

    key: str
    """Digest of everything that determines the set."""
    name: str
    """Name of the stage that sampled."""
    role: str
    iteration: int | None
    scorers: list[str]
    """The scorers; the first is the one by which pairs are chosen, if there is one."""
    prompts: int
    samples: int
    truncated: int
    mean_length: float | None
    means: dict[str, float | None]
    """Mean score by scorer."""
    groups_scored: int
    """Number of prompts with at least two scored answers."""
    groups_with_gradient: int
    """Number of those prompts whose scores are not all equal."""
    correlation: Correlation
    points: list[list[float]]
    """[length, score] of a sample of the answers."""
    pairs: PairFacts | None
    largest: LargestMargin | None
    gap: float | None
    """Mean absolute difference (nats per token) between the log-probabilities of the engine that sampled and those of
    the trainer's code, where both had the same weights."""
    gap_tokens: int
    columns: GroupColumns
    excerpts: dict[str, list[Any]]
    """By prompt id: the beginning of the prompt, and its tags."""
    chunks: list[int]
    """Number of prompts in each chunk of texts."""
    bytes: list[int]
    """Bytes of each chunk of texts."""
    token_bytes: list[int]
    """Bytes of each chunk of log-probabilities."""
    left_out: int
    """Number of prompts that count in the statistics and are not shown."""


class LedgerLine(msgspec.Struct, kw_only=True):
    """The ledger of a stage: its input rows, kept or dropped by reason."""

    stage: str
    iteration: int | None
    role: str
    unit: str
    rows_in: int
    kept: int
    dropped: dict[str, int]


class StageRow(msgspec.Struct, kw_only=True):
    """One stage of the run."""

    name: str
    kind: str
    iteration: int | None
    role: str
    state: str
    detail: str = ""
    attempts: int = 0
    begun: float | None = None
    """Time at which its last attempt began, or was handed to a scheduler."""
    ended: float | None = None
    wait: float | None = None
    """Seconds from `begun` to the start of its process, plus those in which it waited for shards of a stage that it
    streamed from. The next four are seconds as well, as the stage has measured them."""
    load: float | None = None
    """Time of importing libraries and loading models."""
    compute: float | None = None
    other: float | None = None
    total: float | None = None
    devices: int = 1
    pool: str = ""
    """The pool that its devices belong to, if the plan has several."""
    given: list[int] = []
    """Its exclusive devices."""
    held: float | None = None
    """Seconds in which its inputs were complete and its devices were in use by other stages."""
    tokens: int | None = None
    rows: int | None = None
    key: str | None = None
    digest: str | None = None
    weights: str | None = None
    created: str | None = None
    inputs: dict[str, Any] = {}
    versions: dict[str, str] = {}
    hardware: dict[str, Any] = {}


class TrainingCurves(msgspec.Struct, kw_only=True):
    """The log of one training, reduced to means of neighbouring steps."""

    stage: str
    iteration: int | None
    role: str
    steps: list[float]
    series: dict[str, list[float | None]]


class TimeFacts(msgspec.Struct, kw_only=True):
    """How the run's time was spent."""

    wall: float | None
    """Wall-clock time in which a command worked on the run."""
    stages: float
    """Total time of all stages."""
    device_hours: float
    load: float
    compute: float
    wait: float
    other: float
    by_role: dict[str, float]
    held: float
    """Total time in which stages had complete inputs while their devices were in use by other stages."""
    idle: dict[str, float]
    """By pool, the share of the wall-clock time in which its devices were idle."""
    tokens_per_second: dict[str, float]
    """Tokens per second of computing, by role."""


class ExpectedLine(msgspec.Struct, kw_only=True):
    """Durations of the stages of one role: expected by the plan, and measured (seconds)."""

    role: str
    stages: int
    predicted: float
    """Mean of the expected durations."""
    measured: float
    """Mean of the measured durations."""
    error: float
    """One standard deviation of the expectation, relative to it."""
    basis: str
    iterations: list[int | None]
    """The iteration of each stage."""
    ratios: list[float]
    """Measured over expected duration of each stage."""


class JudgeCosts(msgspec.Struct, kw_only=True):
    """The costs of a judge, over all published stages."""

    scorer: str
    stages: int
    answers: int
    """Number of answers that were requested; cached ones are not paid again."""
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    """Cost by the prices in its config; None where it has no prices."""


class RunReport(msgspec.Struct, kw_only=True):
    """The whole report."""

    format: int = 1
    name: str
    path: str
    made: float
    state: str
    """running, under way (as jobs of a scheduler), finished, failed, stopped, interrupted, cancelled, not finished."""
    iterations: int
    """Number of iterations that the run was started with."""
    statements: list[Statement] = []
    missing: list[str] = []
    """Everything that the report should show and cannot, with the reasons."""
    notes: list[str] = []
    """Notable events: failures, retries and the like."""
    evaluations: list[dict[str, Any]] = []
    """The metrics of each published evaluation."""
    refused: list[int] = []
    """Iterations whose policies were refused by a gate that stops or rolls back."""
    stopped: str = ""
    """Why a gate has stopped the run."""
    paid: list[JudgeCosts] = []
    own_evaluations: list[dict[str, Any]] = []
    """Metrics of the user's own evaluations: {iteration, NAME/METRIC: number}, one for each policy."""
    scorers: list[str] = []
    largest: LargestMargin | None = None
    """The pair with the largest margin among those that the policy was trained on."""
    sets: list[SampleSet] = []
    ledgers: list[LedgerLine] = []
    stages: list[StageRow] = []
    time: TimeFacts
    expected: list[ExpectedLine] = []
    """Expected and measured durations by role; empty where the run's plan has no expectation."""
    training: list[TrainingCurves] = []
    calibration: dict[str, list[dict[str, Any]]] = {}
    """Bins of confidence and accuracy of each reward model, by stage."""
    held_out_accuracy: dict[str, float] = {}
    """Accuracy of each reward model, by stage, on pairs that it was not trained on."""
    facts: list[dict[str, Any]] = []
    """Facts from the manifests of an iteration's main stages, for example the drift."""
    config: str = ""
    """The resolved config as YAML, with all defaults."""
    config_of: dict[str, Any] = {}
