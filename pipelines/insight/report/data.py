"""What a report says of a run, as data: bounded, and all that the page, the Markdown and the JSON are made of.

Times are seconds since 1970, durations seconds, lengths tokens. None is what is not known.
"""

from typing import Any, Literal

import msgspec

Tone = Literal["good", "bad", "unclear", "plain"]


class Statement(msgspec.Struct, kw_only=True):
    """One question of somebody who opens a report, and the answer in words."""

    topic: str
    """What it is about: learning, length, dropped, time."""
    question: str
    answer: str
    """One sentence."""
    details: list[str] = []
    tone: Tone = "plain"


class Correlation(msgspec.Struct, kw_only=True):
    """How a score goes with the length of an answer (tokens)."""

    across: float | None
    """Pearson's correlation over all answers."""
    within: float | None
    """The same among the answers to one prompt: of the deviations from the prompt's means."""
    freedom: int
    """Answers to prompts that have several, less those prompts: by how much `within` is known."""
    slope: float | None
    """Score for one token more, among the answers to one prompt."""


class PairFacts(msgspec.Struct, kw_only=True):
    """The pairs that were chosen from a set of answers: means."""

    count: int
    chosen_length: float
    rejected_length: float
    chosen_score: float
    rejected_score: float
    margin: float
    strategy: str


class LargestMargin(msgspec.Struct, kw_only=True):
    """The pair with the largest margin, for those who read only the first screen; long texts are cut."""

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
    """One entry for each prompt with its answers, in the order of the chunks: what the browser sorts and filters by."""

    prompt: list[str] = []
    """Prompt ids."""
    mean: list[float | None] = []
    """Mean score by the first scorer; so are the two that follow."""
    best: list[float | None] = []
    worst: list[float | None] = []
    margin: list[float | None] = []
    """The largest margin of its pairs."""
    length: list[float] = []
    """Mean length."""
    longest: list[int] = []
    samples: list[int] = []
    truncated: list[int] = []
    """Answers that were cut off."""


class SampleSet(msgspec.Struct, kw_only=True):
    """Answers that were sampled by one stage, with what became of them."""

    key: str
    """Digest of everything that it was made from."""
    name: str
    """Of the stage that sampled."""
    role: str
    iteration: int | None
    scorers: list[str]
    """The first is the one by which pairs are chosen, where there is one."""
    prompts: int
    samples: int
    truncated: int
    mean_length: float | None
    means: dict[str, float | None]
    """Mean score by scorer."""
    groups_scored: int
    """Prompts with two scored answers or more."""
    groups_with_gradient: int
    """Those of them whose scores are not all equal."""
    correlation: Correlation
    points: list[list[float]]
    """[length, score] of some answers."""
    pairs: PairFacts | None
    largest: LargestMargin | None
    gap: float | None
    """Mean absolute difference (nats a token) between the log-probabilities of the engine that sampled and those of the
    trainer's code, where both had the same weights."""
    gap_tokens: int
    columns: GroupColumns
    excerpts: dict[str, list[Any]]
    """By prompt id: the beginning of the prompt, and its tags."""
    chunks: list[int]
    """Groups in each chunk of texts."""
    bytes: list[int]
    """Bytes of each chunk."""
    token_bytes: list[int]
    """Bytes of the log-probabilities of each chunk's answers."""
    left_out: int
    """Prompts that are counted and not shown."""


class LedgerLine(msgspec.Struct, kw_only=True):
    """What became of what came into a stage."""

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
    """When its last attempt began, or was handed to a scheduler."""
    ended: float | None = None
    wait: float | None = None
    """Seconds from there to the start of its process, and in which it waited for shards of a stage that it followed; so
    with the next four, as the stage measured them."""
    load: float | None = None
    """Importing libraries and loading models."""
    compute: float | None = None
    other: float | None = None
    total: float | None = None
    devices: int = 1
    pool: str = ""
    """The pool of devices that it was given a part of, where the plan has several."""
    given: list[int] = []
    """The devices that it had for itself."""
    held: float | None = None
    """Seconds in which it had its inputs, and others had its devices."""
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
    """The log of one training, thinned: means of neighbouring steps."""

    stage: str
    iteration: int | None
    role: str
    steps: list[float]
    series: dict[str, list[float | None]]


class TimeFacts(msgspec.Struct, kw_only=True):
    """Where the time of the run went."""

    wall: float | None
    """From its first event to its last, without the time in which nobody worked on it."""
    stages: float
    """Sum over the stages."""
    device_hours: float
    load: float
    compute: float
    wait: float
    other: float
    by_role: dict[str, float]
    held: float
    """Sum over the stages of the time in which they had their inputs, and others had their devices."""
    idle: dict[str, float]
    """By pool, the share of the wall-clock time in which its devices computed nothing."""
    tokens_per_second: dict[str, float]
    """By role, over the time that was computed."""


class ExpectedLine(msgspec.Struct, kw_only=True):
    """What the plan expected the stages of one role to take, and what they took, in seconds."""

    role: str
    stages: int
    predicted: float
    """On average, and so is:"""
    measured: float
    error: float
    """One standard deviation of what was expected, as a share."""
    basis: str
    iterations: list[int | None]
    """Of each stage, and:"""
    ratios: list[float]
    """what it took over what was expected."""


class PaidLine(msgspec.Struct, kw_only=True):
    """What a judge's answers have taken, over all stages that are published."""

    scorer: str
    stages: int
    answers: int
    """Those that were asked for; what was kept from before is not paid again."""
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    """By the prices in its configuration; None: there are none."""


class RunReport(msgspec.Struct, kw_only=True):
    """All of it."""

    format: int = 1
    name: str
    path: str
    made: float
    state: str
    """running, under way (as jobs of a scheduler), finished, failed, stopped, interrupted, cancelled, not finished."""
    iterations: int
    """Asked for."""
    statements: list[Statement] = []
    missing: list[str] = []
    """What the report would show and cannot, each with the reason."""
    notes: list[str] = []
    """What happened on the way."""
    evaluations: list[dict[str, Any]] = []
    """The metrics of each published evaluation."""
    refused: list[int] = []
    """Iterations whose policies a gate holds for that stops or rolls back."""
    stopped: str = ""
    """Why a gate has stopped the run."""
    paid: list[PaidLine] = []
    own_evaluations: list[dict[str, Any]] = []
    """What the user's own evaluations say: {iteration, NAME/METRIC: number}, one for each policy."""
    scorers: list[str] = []
    largest: LargestMargin | None = None
    """Of the pairs that the policy was trained on."""
    sets: list[SampleSet] = []
    ledgers: list[LedgerLine] = []
    stages: list[StageRow] = []
    time: TimeFacts
    expected: list[ExpectedLine] = []
    """By role, where the run's plan says what it expects."""
    training: list[TrainingCurves] = []
    calibration: dict[str, list[dict[str, Any]]] = {}
    """By stage: bins of confidence and accuracy."""
    held_out_accuracy: dict[str, float] = {}
    """By stage: of reward models, on pairs that they were not trained on."""
    facts: list[dict[str, Any]] = []
    """By iteration: what the stages say of themselves, for example the drift."""
    config: str = ""
    """The configuration with everything that it leaves to defaults."""
    config_of: dict[str, Any] = {}
