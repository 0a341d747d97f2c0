"""Defines the records that pass between stages. Token ids are authoritative; text is for people.

Each record is one JSON object on one line. Unknown fields are an error, so that a file of another version is never
read in part.
"""

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "stop_string", "length"]
"""Why an answer ended: with a stop token, with one of the texts of `stop`, or at the token limit."""
LogprobMode = Literal["raw", "processed"]


class Schema(msgspec.Struct, frozen=True):
    """Name and version of the format of an artifact's content, as written into its manifest."""

    name: str
    version: int


PROMPTS = Schema("prompts", 1)
ROLLOUTS = Schema("rollouts", 1)
SCORES = Schema("scores", 1)
PAIRS = Schema("pairs", 1)
DEMONSTRATIONS = Schema("demonstrations", 1)
CHECKPOINT = Schema("checkpoint", 1)
EXPERIENCE = Schema("experience", 1)
EVALUATION = Schema("evaluation", 1)
CHECKPOINT_EVALUATION = Schema("checkpoint-evaluation", 1)
GATE = Schema("gate", 1)
WORLD = Schema("world", 1)


JsonObjects = tuple[dict[str, Any], ...]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of every record. A field that is `UNSET` is left out of the file."""


class Message(Record, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    """Text; may be empty in an assistant's turn with `tool_calls`."""
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    """Reasoning of the assistant before its answer."""
    tool_calls: JsonObjects | msgspec.UnsetType = msgspec.UNSET
    """Tool calls of an assistant: `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with `id` if
    the call has one."""
    tool_call_id: str | msgspec.UnsetType = msgspec.UNSET
    """Id of the call that a tool's turn answers."""
    name: str | msgspec.UnsetType = msgspec.UNSET
    """Name of the speaker: a tool, or one of several users."""


class Prompt(Record, frozen=True):
    """A conversation that ends where the policy has to answer."""

    prompt_id: str
    """Hash of the content (`contracts.prompts.prompt_id`)."""
    messages: tuple[Message, ...]
    answer: str | None = None
    """A known answer, for rule scorers."""
    tags: tuple[str, ...] = ()
    tools: JsonObjects | msgspec.UnsetType = msgspec.UNSET
    """Tools that the assistant may call:
    `{"type": "function", "function": {"name": ..., "parameters": JSON Schema}}`."""


class Sampling(Record, frozen=True):
    """The sampling parameters of one completion. Parameters that are `UNSET` had no effect."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    min_p: float | msgspec.UnsetType = msgspec.UNSET
    min_tokens: int | msgspec.UnsetType = msgspec.UNSET
    """Minimum length of the answer in tokens."""
    repetition_penalty: float | msgspec.UnsetType = msgspec.UNSET
    presence_penalty: float | msgspec.UnsetType = msgspec.UNSET
    frequency_penalty: float | msgspec.UnsetType = msgspec.UNSET
    stop: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    """Texts that end the answer where they occur in it."""
    guided: str | msgspec.UnsetType = msgspec.UNSET
    """The constraint of guided decoding: its kind and the first 16 hex digits of its digest ("regex 0f..."); the
    constraint itself is in the manifest's configuration."""
    thinking_tokens: int | msgspec.UnsetType = msgspec.UNSET
    """Maximum tokens of reasoning, after which its end was forced."""

    def departures(self) -> str:
        """The parameters by which the sampled distribution differs from the policy's own ("temperature=0.7, top_k=5"),
        or "". The maximum length and the stop texts do not count, because they change no token's probability."""
        own: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        values = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not msgspec.UNSET}
        free = ("max_tokens", "stop")
        changed = [name for name, value in values.items() if name not in free and value != own.get(name)]
        return ", ".join(f"{name}={_shown(values[name])}" for name in changed)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class Completion(Record, frozen=True):
    """One answer of the policy."""

    sample: int
    """Index among the K completions of the prompt."""
    response_ids: tuple[int, ...]
    """Exactly the sampled tokens. The last one is the EOS (or end-of-turn) token if and only if `finish_reason` is
    "stop", and the token that completed the stop string if it is "stop_string"."""
    text: str
    """The response without special tokens, up to the stop string if that ended it."""
    finish_reason: FinishReason
    """"length": truncated by the token limit, without EOS. "stop_string": complete, without EOS."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each response token under the policy that sampled it; empty if unknown."""
    seed: int | None
    """Sampling seed; None (unknown) for imported answers."""
    sampling: Sampling | None
    """Sampling parameters; None (unknown) for imported answers."""


class Rollout(Record, frozen=True):
    """One prompt with its K completions."""

    prompt_id: str
    messages: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    """The tokens that the engine received: the conversation in the chat template, applied once."""
    completions: tuple[Completion, ...]
    policy: str
    """Fingerprint of the weights that sampled the completions; "imported" if they come from elsewhere."""
    iteration: int
    logprob_mode: LogprobMode
    """"processed": log-probabilities of the distribution sampled from (after temperature, top-k, top-p); "raw": of the
    model's own distribution."""
    answer: str | None = None
    tags: tuple[str, ...] = ()
    tools: JsonObjects | msgspec.UnsetType = msgspec.UNSET
    """The prompt's tools."""


class Score(Record, frozen=True):
    """One scorer's score of one completion, keyed by (`prompt_id`, `sample`)."""

    prompt_id: str
    sample: int
    score: float
    """A reward, the summed log-probability of the response (nats), or a critic's value of the state before the first
    response token, that is, of the prompt."""
    token_logprobs: tuple[float, ...] | None = None
    """For the scorer kind `logprobs`: one number per response token (nats)."""
    token_values: tuple[float, ...] | None = None
    """For the scorer kind `values`: for each response token, the critic's value of the state before it, which consists
    of the prompt and the preceding response tokens."""
    token_rewards: tuple[float, ...] | msgspec.UnsetType = msgspec.UNSET
    """For scorers that score every token: one reward per response token, for algorithms that use token rewards."""
    parts: dict[str, float] | msgspec.UnsetType = msgspec.UNSET
    """Named numbers that the score is composed of, or that the scorer reports in addition; samples may have different
    parts. Names are valid Python identifiers."""
    extras: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    """Named JSON values for display only, such as an extracted answer or an explanation."""


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
    """The score by which the pair was selected, which is also the one that labels it."""
    rejected_score: float
    margin: float
    """`chosen_score - rejected_score`, never negative."""
    strategy: str
    iteration: int
    messages: tuple[Message, ...] = ()
    """The conversation that was answered; empty in pairs of earlier versions, which did not store it."""
    tools: JsonObjects | msgspec.UnsetType = msgspec.UNSET
    """The prompt's tools."""
    tags: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    """The prompt's tags, if it has any."""


class ExperienceSample(Record, frozen=True):
    """One answer with the advantages of its tokens. Every tuple has one number per response token."""

    sample: int
    """Index among the completions of the prompt, as in the rollouts."""
    response_ids: tuple[int, ...]
    finish_reason: FinishReason
    reward: float
    behaviour: tuple[float, ...]
    """Log-probabilities under the policy that sampled the answer, as its engine reported them (nats)."""
    advantages: tuple[float, ...]
    reference: tuple[float, ...] | None = None
    """Log-probabilities under the reference policy (nats), if the algorithm needs them."""
    values: tuple[float, ...] | None = None
    """The critic's value of the state before each token, before the critic is trained on this sample."""
    returns: tuple[float, ...] | None = None
    """Targets of the critic for `values`."""


class ExperienceRow(Record, frozen=True):
    """The answers to one prompt that are trained on; prompts without any such answer have no row."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    samples: tuple[ExperienceSample, ...]
    policy: str
    """Fingerprint of the weights that sampled the answers."""
    iteration: int
    tags: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    """The prompt's tags, if it has any."""
