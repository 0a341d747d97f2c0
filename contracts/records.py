"""The records that pass between stages. Token ids are the truth; text is there for people.

Each record is one JSON object on one line. Unknown fields are an error, so that a file of another version is
never half understood.
"""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length"]
LogprobMode = Literal["raw", "processed"]


class Schema(msgspec.Struct, frozen=True):
    """Name and version of what an artifact holds, as written into its manifest."""

    name: str
    version: int


PROMPTS = Schema("prompts", 1)
ROLLOUTS = Schema("rollouts", 1)
SCORES = Schema("scores", 1)
PAIRS = Schema("pairs", 1)
DEMONSTRATIONS = Schema("demonstrations", 1)
CHECKPOINT = Schema("checkpoint", 1)
EVALUATION = Schema("evaluation", 1)
WORLD = Schema("world", 1)


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of every record."""


class Message(Record, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Prompt(Record, frozen=True):
    """A conversation that ends where the policy has to answer."""

    prompt_id: str
    """Hash of the content (`contracts.prompts.prompt_id`)."""
    messages: tuple[Message, ...]
    answer: str | None = None
    """A known answer, for rule scorers."""
    tags: tuple[str, ...] = ()


class Sampling(Record, frozen=True):
    """The sampling parameters of one completion."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


class Completion(Record, frozen=True):
    """One answer of the policy."""

    sample: int
    """Index among the K completions of the prompt."""
    response_ids: tuple[int, ...]
    """Ends with the EOS (or end-of-turn) token exactly when `finish_reason` is "stop"."""
    text: str
    """The response without special tokens."""
    finish_reason: FinishReason
    """"length": truncated by the token limit; such an answer carries no EOS."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each response token under the policy that sampled it; empty: unknown."""
    seed: int | None
    """None: unknown, for answers that were imported."""
    sampling: Sampling | None
    """None: unknown, for answers that were imported."""


class Rollout(Record, frozen=True):
    """One prompt with its K completions."""

    prompt_id: str
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    """The tokens that the engine was given: the chat template applied once."""
    completions: tuple[Completion, ...]
    policy: str
    """Fingerprint of the weights that sampled; "imported" for answers that came from elsewhere."""
    iteration: int
    logprob_mode: LogprobMode
    """"processed": of the distribution sampled from (after temperature, top-k, top-p); "raw": of the model's own."""
    answer: str | None = None
    tags: tuple[str, ...] = ()


class Score(Record, frozen=True):
    """One scorer's judgement of one completion, keyed by (`prompt_id`, `sample`)."""

    prompt_id: str
    sample: int
    score: float
    """A reward, or the summed log-probability of the response (nats)."""
    token_logprobs: tuple[float, ...] | None = None
    """For the scorer kind `logprobs`: one value per response token (nats)."""


class Pair(Record, frozen=True):
    """Two completions of one prompt, the first preferred."""

    pair_id: str
    prompt_id: str
    prompt: str
    """The last user message, for people."""
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen: str
    rejected: str
    chosen_sample: int
    rejected_sample: int
    chosen_finish_reason: FinishReason
    rejected_finish_reason: FinishReason
    chosen_score: float
    """The score that selected, which is the score that labels."""
    rejected_score: float
    margin: float
    """`chosen_score - rejected_score`, never negative."""
    strategy: str
    iteration: int


class Demonstration(Record, frozen=True):
    """A conversation whose last message is the answer to imitate (supervised fine-tuning)."""

    prompt_id: str
    messages: tuple[Message, ...]
