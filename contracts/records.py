"""The records that pass between stages. Token ids are the truth; text is there for people.

Each record is one JSON object on one line. Unknown fields are an error, so that a file of another version is
never half understood.
"""

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "stop_string", "length"]
"""Why an answer ends: with a token that ends answers, with one of the texts of `stop`, or at the token limit."""
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
EXPERIENCE = Schema("experience", 1)
EVALUATION = Schema("evaluation", 1)
CHECKPOINT_EVALUATION = Schema("checkpoint-evaluation", 1)
GATE = Schema("gate", 1)
WORLD = Schema("world", 1)


JsonObjects = tuple[dict[str, Any], ...]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of every record. A field that may be `UNSET` is left out of the file where it is."""


class Message(Record, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    """May be empty where an assistant's turn has `tool_calls`."""
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    """What an assistant thought before it answered."""
    tool_calls: JsonObjects | msgspec.UnsetType = msgspec.UNSET
    """What an assistant calls: `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with `id` where
    the calls have one."""
    tool_call_id: str | msgspec.UnsetType = msgspec.UNSET
    """The call that a tool's turn answers."""
    name: str | msgspec.UnsetType = msgspec.UNSET
    """Who speaks: a tool, or one of several users."""


class Prompt(Record, frozen=True):
    """A conversation that ends where the policy has to answer."""

    prompt_id: str
    """Hash of the content (`contracts.prompts.prompt_id`)."""
    messages: tuple[Message, ...]
    answer: str | None = None
    """A known answer, for rule scorers."""
    tags: tuple[str, ...] = ()
    tools: JsonObjects | msgspec.UnsetType = msgspec.UNSET
    """What the assistant may call: `{"type": "function", "function": {"name": ..., "parameters": JSON Schema}}`."""


class Sampling(Record, frozen=True):
    """The sampling parameters of one completion. Those that may be `UNSET` change nothing where they are."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    min_p: float | msgspec.UnsetType = msgspec.UNSET
    min_tokens: int | msgspec.UnsetType = msgspec.UNSET
    """Tokens before which the answer could not end."""
    repetition_penalty: float | msgspec.UnsetType = msgspec.UNSET
    presence_penalty: float | msgspec.UnsetType = msgspec.UNSET
    frequency_penalty: float | msgspec.UnsetType = msgspec.UNSET
    stop: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    """Texts with which the answer ended, if it came to one of them."""
    guided: str | msgspec.UnsetType = msgspec.UNSET
    """What kept the answer to a form: its kind and the first 16 hex digits of its digest ("regex 0f..."); the form
    itself is in the manifest's configuration."""
    thinking_tokens: int | msgspec.UnsetType = msgspec.UNSET
    """Tokens of thoughts after which their end was forced."""

    def departures(self) -> str:
        """In what it was not the policy's own distribution that was sampled from ("temperature=0.7, min_p=0.1"); empty
        where it was. How long an answer may be and what ends it change no token's probability."""
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
    """The tokens that were sampled, and no other. Ends with the EOS (or end-of-turn) token exactly when `finish_reason`
    is "stop", and with the token that completed the text when it is "stop_string"."""
    text: str
    """The response without special tokens, and up to the text that ended it."""
    finish_reason: FinishReason
    """"length": truncated by the token limit; such an answer carries no EOS. "stop_string": whole, and without EOS."""
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
    tools: JsonObjects | msgspec.UnsetType = msgspec.UNSET
    """As in the prompt."""


class Score(Record, frozen=True):
    """One scorer's judgement of one completion, keyed by (`prompt_id`, `sample`)."""

    prompt_id: str
    sample: int
    score: float
    """A reward, the summed log-probability of the response (nats), or a critic's value of the prompt: of the state
    before the first response token."""
    token_logprobs: tuple[float, ...] | None = None
    """For the scorer kind `logprobs`: one number per response token (nats)."""
    token_values: tuple[float, ...] | None = None
    """For the scorer kind `values`: for each response token, the critic's value of the state in which it was chosen, so
    of the prompt and the response tokens before it."""
    token_rewards: tuple[float, ...] | msgspec.UnsetType = msgspec.UNSET
    """For scorers that judge token by token: one reward per response token, for algorithms that learn from these."""
    parts: dict[str, float] | msgspec.UnsetType = msgspec.UNSET
    """Numbers by name that the score was made of, or that were found beside it; not all samples need to have the same.
    Names are those of Python variables."""
    extras: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    """What else is worth showing, as JSON by name: an extracted answer, an explanation. Nothing computes with it."""


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
    messages: tuple[Message, ...] = ()
    """The conversation that was answered; empty in pairs that were made before it was kept."""
    tools: JsonObjects | msgspec.UnsetType = msgspec.UNSET
    """As in the prompt."""
    tags: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    """Of the prompt, where it has some."""


class ExperienceSample(Record, frozen=True):
    """One answer, and how much better than expected each of its tokens was. Every tuple has one number per token."""

    sample: int
    """Index among the completions of the prompt, as in the rollouts."""
    response_ids: tuple[int, ...]
    finish_reason: FinishReason
    reward: float
    behaviour: tuple[float, ...]
    """Log-probabilities of the policy that sampled, as its engine reported them (nats)."""
    advantages: tuple[float, ...]
    reference: tuple[float, ...] | None = None
    """Log-probabilities under the reference policy (nats), where the algorithm needs them."""
    values: tuple[float, ...] | None = None
    """The critic's, before it is trained on this: of the state in which each token was chosen."""
    returns: tuple[float, ...] | None = None
    """What the critic is to learn instead of `values`."""


class ExperienceRow(Record, frozen=True):
    """The answers to one prompt that are trained on; prompts of which none is left have no row."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    samples: tuple[ExperienceSample, ...]
    policy: str
    """Fingerprint of the weights that sampled."""
    iteration: int
    tags: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    """Of the prompt, where it has some."""
