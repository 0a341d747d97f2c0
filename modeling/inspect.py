"""Checks a model's tokenizer and chat template in the environment that will use them.

Weights are not loaded, and code that comes with a model is not run.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from msgspec import UNSET

from contracts.chat import ChatTokenizer
from contracts.conversations import with_answer
from contracts.errors import UserError
from contracts.models import ModelInfo
from contracts.pairwise import PairwiseChat
from contracts.preflight import Finding, Inspected
from contracts.records import Message
from contracts.template import TemplateRefusedError

SYSTEM = Message("system", "Be brief.")
QUESTION = Message("user", "What is the capital of France?")
ANSWER = Message("assistant", "It is Paris.")
OTHER = Message("assistant", "I do not know.")
TODAY = "2000-01-01"
"""The date passed to chat templates that write one."""


PROBES = (
    "Hello, world!  Two spaces,\ta tab,\n\nand an empty line.\n",
    " a leading space",
    "naïve café — “quotes” … 3.14159 1,000,000 2026-01-31",
    "def f(x):\n    return x ** 2  # code\n",
    "你好世界。 こんにちは 안녕하세요 مرحبا שלום Привет नमस्ते",
    "🙂👩‍👩‍👧‍👦 e\u0301 ﬁ ½ \u200b\u00a0",
)
"""Texts that every environment tokenizes and decodes; the driver compares the results."""


Renders = Literal["prompts", "answers", "comparisons", "nothing"]


def examine_model(stage: Inspected, model: Path, renders: Renders) -> Iterator[Finding]:
    """Check a model's tokenizer and chat template, with the user's own conversations.

    Args:
        renders: what this model's template will render: prompts (a policy), prompts with an answer (a reward model),
            with two answers (a pairwise reward model), or nothing (a model that receives token ids).
    """
    variables, date = getattr(stage.config, "chat_template_kwargs", None), getattr(stage.config, "date", None)
    for finding in inspect(model, variables):
        named = str(model) in finding.found
        yield Finding(finding.level, finding.found if named else f"{model}: {finding.found}", finding.fix)
        if finding.level == "error":
            return
    chat = ChatTokenizer(model, variables, date)
    if renders != "nothing":
        yield from check_rendering(stage, chat, renders)
    record_probes(stage, chat)


def record_probes(stage: Inspected, chat: ChatTokenizer) -> None:
    """Report to the driver how a model's tokenizer behaves in this environment, for comparison with the others."""
    stage.report.probes[str(chat.path)] = probes(chat, stage)
    stage.report.vocabularies[str(chat.path)] = chat.vocabulary


def check_rendering(stage: Inspected, chat: ChatTokenizer, renders: Renders) -> Iterator[Finding]:
    """Check that the chat template renders the user's conversations; report the first one that it refuses."""
    answers = renders == "answers"
    pairwise = PairwiseChat(chat.path, chat.variables, chat.date) if renders == "comparisons" else None
    if pairwise is not None:
        _ = pairwise.label_ids  # raises unless each label is a single token
    conversations = stage.prompts()
    refused: list[str] = []
    drops = getattr(stage.config, "refused", "error") == "drop"
    for conversation in conversations:
        messages = conversation.messages
        if answers:
            messages = with_answer(messages, ANSWER.content)
        try:
            tools = UNSET if conversation.tools is None else conversation.tools
            if pairwise is not None:
                pairwise.token_ids(messages, ANSWER.content, OTHER.content, conversation.place, tools)
            else:
                chat.conversation(messages, tools=tools, for_answer=not answers, what=conversation.place)
        except UserError as error:
            refused.append(str(error))
            drops &= isinstance(error, TemplateRefusedError)
    if refused:
        more = f" ({len(refused)} of {len(conversations)} conversations that were tried)" if len(refused) > 1 else ""
        yield Finding("warning" if drops else "error", f"{refused[0]}{more}")
    elif conversations:
        yield Finding("ok", f"{chat.path}: its chat template renders your prompts ({len(conversations)} were tried)")


def probes(chat: ChatTokenizer, stage: Inspected) -> list[dict[str, Any]]:
    """The results of this environment's tokenizer on fixed texts, the user's texts, a rendered template, and the tokens
    that end an answer. Every environment returns the same list, for comparison."""
    texts = [*PROBES, *(turn.content for one in stage.conversations for turn in one.messages)]
    if chat.tokenizer.chat_template:
        texts.append(ChatTokenizer(chat.path, date=TODAY).render([QUESTION], for_answer=True))
    ends = {"text": "the end of an answer", "ids": list(chat.stop_ids), "decoded": chat.tokenizer.decode(chat.stop_ids)}
    return [*(probe(chat, text) for text in texts), ends]


def probe(chat: ChatTokenizer, text: str) -> dict[str, Any]:
    """The token ids of a text, and the text that they decode to."""
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"text": text, "ids": ids, "decoded": chat.tokenizer.decode(ids)}


def inspect(model: Path, variables: dict[str, Any] | None = None) -> list[Finding]:
    """Check one model directory.

    Args:
        variables: `chat_template_kwargs` of the stage that reads the model.
    """
    try:
        info = ModelInfo.read(model)
        code = check_support(model)
        if code.level == "error":
            return [code]
        chat = ChatTokenizer(model, variables, TODAY)
    except UserError as error:
        return [Finding("error", str(error))]
    except Exception as error:  # depending on its files, a tokenizer can raise anything
        return [
            Finding(
                "error",
                f"its tokenizer cannot be loaded: {type(error).__name__}: {_first_line(error)}",
                "Save the tokenizer again with save_pretrained, as one that needs no code of its own.",
            )
        ]
    findings = [code, check_vocabulary(chat, embedding_rows(model))]
    if not chat.tokenizer.chat_template:
        return [*findings, _no_template(info)]
    messages = [QUESTION, ANSWER]
    try:
        prompt = chat.conversation(messages[:-1], for_answer=True)
        whole = chat.conversation(messages)
    except UserError as error:
        return [*findings, Finding("error", str(error))]
    except Exception as error:  # templates are programs, and can raise anything
        fix = "Fix chat_template.jinja, or take that of the model's authors."
        return [*findings, Finding("error", f"its chat template fails: {_first_line(error)}", fix)]
    rendered = f"its chat template renders a conversation of {len(messages)} turns in {len(whole)} tokens"
    findings += [Finding("ok", rendered), check_bos(chat, messages, prompt)]
    if chat.template.reads_clock():
        findings.append(
            Finding("ok", "its chat template writes the date: the day on which the run was made, or `date`")
        )
    if info.labels is None:
        findings.append(check_answers(chat))
        findings.append(check_turn_end(chat, messages))
        findings.append(check_padding(chat.tokenizer))
    else:
        findings.append(check_thoughts(chat))
    return findings


def check_support(model: Path) -> Finding:
    """Whether transformers knows the architecture, or would need code that comes with the model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = json.loads((model / "config.json").read_bytes())
    model_type = config.get("model_type")
    if model_type in CONFIG_MAPPING_NAMES:
        ignored = "; the code that comes with it (auto_map) is not used" if "auto_map" in config else ""
        return Finding("ok", f"transformers knows its architecture ({model_type}){ignored}")
    fix = "Use a model of an architecture that transformers knows, or an environment with a transformers that does."
    if "auto_map" in config:
        found = f"it needs its own code (auto_map in config.json, model_type {model_type!r}): trust_remote_code is off"
        return Finding("error", found, fix + " Code that comes with a model is never run.")
    return Finding("error", f"the installed transformers does not know its model_type {model_type!r}", fix)


def embedding_rows(model: Path) -> int | None:
    """The number of rows of the model's embedding, from its weights or else from config.json."""
    from safetensors import safe_open

    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")):
                    return int(tensors.get_slice(name).get_shape()[0])
    config = json.loads((model / "config.json").read_bytes())
    rows = {**config, **(config.get("text_config") or {})}.get("vocab_size")
    return None if rows is None else int(rows)


def check_vocabulary(chat: ChatTokenizer, rows: int | None) -> Finding:
    """Check that the embedding has a row for every token of the tokenizer, EOS included."""
    tokenizer = chat.tokenizer
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if rows is None:
        found = f"its tokenizer has {size} tokens; the number of rows of the embedding is unknown"
        return Finding("warning", found, "Save the model again with save_pretrained.")
    if size > rows:
        eos = tokenizer.eos_token_id
        which = f"its EOS {tokenizer.eos_token!r}" if eos is not None and eos >= rows else "the others"
        return Finding(
            "error",
            f"its tokenizer has {size} tokens, but the embedding has only {rows} rows: {which} would be an error",
            "Use the tokenizer that belongs to these weights, or resize the embeddings (resize_token_embeddings).",
        )
    return Finding("ok", f"its tokenizer has {size} tokens for {rows} rows of the embedding")


def check_bos(chat: ChatTokenizer, messages: list[Message], prompt: list[int]) -> Finding:
    """Check that a conversation begins with at most one BOS, in Ratchet and in programs that tokenize rendered text."""
    tokenizer = chat.tokenizer
    begin = tokenizer.bos_token_id
    if begin is None:
        return Finding("ok", "its tokenizer has no BOS token")
    text = chat.render(messages[:-1], for_answer=True)
    here, again = _leading(prompt, begin), _leading(tokenizer(text)["input_ids"], begin)
    name = repr(tokenizer.bos_token)
    if here == 1 and again == 2:
        return Finding(
            "warning",
            f"its chat template writes BOS ({name}), and its tokenizer adds another to a text: Ratchet applies the "
            "template once and has one BOS, but a program that tokenizes the rendered text has two",
            "Elsewhere tokenize rendered text with add_special_tokens=False, or take BOS out of the template or the "
            "tokenizer's post-processor.",
        )
    if here == 0 and again:
        return Finding(
            "warning",
            f"its tokenizer puts BOS ({name}) before a text, but its chat template writes none: Ratchet's "
            "conversations have no BOS",
            "If the model was trained with BOS, begin chat_template.jinja with {{ bos_token }}.",
        )
    return Finding("ok", f"conversations begin with {f'one BOS ({name})' if here else 'no BOS'}")


def _leading(ids: list[int], token: int) -> int:
    return next((index for index, found in enumerate(ids) if found != token), len(ids))


def check_answers(chat: ChatTokenizer) -> Finding:
    """Check that supervised fine-tuning can append a plain answer to the prompts that generation renders."""
    if chat.stop_ids and chat.prompt_and_answer([QUESTION, ANSWER]) == "no_thinking":
        return Finding(
            "warning",
            "its prompts already open the model's thoughts (<think>), so supervised fine-tuning drops demonstrations "
            "without thoughts (no_thinking)",
            "Use demonstrations with thoughts, or set chat_template_kwargs so that prompts do not open them (often "
            "enable_thinking: false).",
        )
    return Finding("ok", "answers are tokenized as continuations of the prompts that generation renders")


def check_thoughts(chat: ChatTokenizer) -> Finding:
    """Check whether the chat template keeps the thoughts in an answer that a reward model scores."""
    text = chat.render([QUESTION, Message("assistant", f"<think>\n{SYSTEM.content}\n</think>\n\n{ANSWER.content}")])
    if SYSTEM.content in text:
        return Finding("ok", "it sees whole answers, including thoughts (<think>)")
    found = "its chat template leaves out the thoughts (<think>...</think>) of answers: it scores only what follows"
    return Finding("warning", found, "Use another reward model if thoughts should be scored.")


def check_turn_end(chat: ChatTokenizer, messages: list[Message]) -> Finding:
    """Check that generation stops at the token with which the template ends an assistant's turn."""
    tokenizer, stops = chat.tokenizer, chat.stop_ids
    named = {stop: tokenizer.convert_ids_to_tokens(stop) for stop in stops}
    if all(name is None for name in named.values()):
        of = f"no EOS token that its tokenizer has (eos_token_id is {', '.join(map(str, stops))})"
        return Finding(
            "error",
            f"it names {of if stops else 'no EOS token'}, so no answer would ever end",
            'Set eos_token in tokenizer_config.json, or "eos_token_id" in generation_config.json.',
        )
    known = ", ".join(
        f"{stop}, which no token has" if name is None else f"{name!r} ({stop})" for stop, name in named.items()
    )
    text = chat.render(messages)
    before, _, behind = text.rpartition(ANSWER.content)
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if before else []
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    end = next((token for token in ids if token in special), ids[0] if ids and behind.strip() else None)
    if end is None:
        return Finding(
            "warning",
            f"its chat template writes nothing after an assistant's answer; generation stops at {known}",
            "If the model ends its answers with EOS, write {{ eos_token }} after them in chat_template.jinja.",
        )
    name = repr(tokenizer.convert_ids_to_tokens(end))
    if end in stops:
        why = "EOS" if end == tokenizer.eos_token_id else "a stop token of generation_config.json"
        return Finding("ok", f"an assistant's turn ends with {name}, {why}")
    return Finding(
        "error" if end in special else "warning",
        f"its chat template ends an assistant's turn with {name}, but generation stops only at {known}: answers would "
        "continue past their end",
        f'Add {end} to the list "eos_token_id" in generation_config.json.',
    )


def check_padding(tokenizer: Any) -> Finding:
    """Report the padding token; it makes no difference to Ratchet."""
    if tokenizer.pad_token_id is None:
        return Finding("ok", "it has no padding token, which is fine: sequences are masked by their length")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return Finding("ok", "its padding is its EOS, which is fine: sequences are masked by their length")
    return Finding("ok", f"its padding is {tokenizer.pad_token!r}")


def _no_template(info: ModelInfo) -> Finding:
    try:
        info.require_chat_template()
    except UserError as error:
        return Finding("error", str(error))
    return Finding("error", f"the chat template of {info.path} is empty", "Write chat_template.jinja.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
