"""Supervised fine-tuning on the last answer of each demonstration."""

from collections.abc import Iterable, Iterator

from transformers import AutoModelForCausalLM

from contracts.chat import ChatTokenizer
from contracts.demonstrations import DemonstrationRow, read_demonstrations
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.stage import Context, Outcome
from modeling.loading import load_causal, read_config, vocabulary_size
from modeling.modules import TokenLogprobs
from modeling.rows import Response, Row, token_ids
from training.algorithm import Metrics
from training.config import SftConfig
from training.data import length_limit, usable_rows
from training.engines.base import Outputs
from training.fit import TrainingTask, fit
from training.loop import Learning, MicroBatch


def run(config: SftConfig, context: Context) -> Outcome:
    """Run the stage `sft`."""
    info = ModelInfo.read(config.model)
    info.require_causal()
    info.require_chat_template()
    limit = length_limit(config, info)
    model_config = read_config(config.model)
    chat = ChatTokenizer(config.model, config.chat_template_kwargs, config.date)
    chat.require_stop()
    ledger = Ledger("demonstrations")
    demonstrations = read_demonstrations(config.demonstrations)
    rows = usable_rows(
        tokenized(demonstrations, chat, ledger),
        ledger,
        limit=limit,
        vocabulary=vocabulary_size(model_config),
        max_dropped=config.max_dropped,
        what=str(config.demonstrations),
    )
    task = TrainingTask(
        ledger=ledger,
        learning=Learning(rows, sft_loss),
        load=lambda dtype, empty: load_causal(config.model, dtype, master=True, empty=empty),
        wrap=TokenLogprobs,
        auto=AutoModelForCausalLM,
        model_config=model_config,
        facts={"stop_tokens": chat.stop_ids, "not_read": demonstrations.layout.not_read, **chat.counts},
    )
    outcome = fit(config, context, task)
    outcome.note = demonstrations.layout.note
    return outcome


def sft_loss(outputs: Outputs, micro_batch: MicroBatch) -> Metrics:
    """Negative log-likelihood per response token of the global batch."""
    return {"loss": -micro_batch.weight * outputs["logprobs"].sum() / micro_batch.totals.tokens}


def tokenized(conversations: Iterable[DemonstrationRow], chat: ChatTokenizer, ledger: Ledger) -> Iterator[Row]:
    """Tokenize demonstrations with the chat template; the last answer is the response, which the loss is computed on.

    A response ends with the token that ends generation: text that the template adds after it is cut off, and a missing
    one is appended, so that the model learns to stop exactly where the engine stops. Rows without an answer (no_answer,
    empty_answer) are dropped, and those that `ChatTokenizer.prompt_and_answer` rejects with a reason.

    Raises:
        UserError: the template refuses a conversation, or omits a part of it.
    """
    for number, conversation in enumerate(conversations, 1):
        messages = conversation.messages
        if len(messages) < 2 or messages[-1].role != "assistant":
            ledger.drop("no_answer")
            continue
        if not messages[-1].content.strip() and not messages[-1].tool_calls:
            ledger.drop("empty_answer")
            continue
        row_id = conversation.prompt_id or f"row {number}"
        answered = chat.prompt_and_answer(messages, tools=conversation.tools, what=f"demonstration {row_id}")
        if isinstance(answered, str):
            ledger.drop(answered)
            continue
        yield Row(row_id, token_ids(answered.prompt), (Response(token_ids(answered.response)),))
