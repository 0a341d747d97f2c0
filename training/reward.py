"""A Bradley-Terry reward model, trained on the token ids of pairs."""

from typing import Any

from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.seeds import derive_seed
from contracts.stage import Context, Outcome
from training.config import RewardConfig
from training.data import Row, length_limit, pair_sequences, read_pairs, usable
from training.fit import Task, fit
from training.logprobs import SequenceScore, collate
from training.loop import Totals
from training.losses import bradley_terry
from training.models import load_reward, read_config, vocabulary_size


def run(config: RewardConfig, context: Context) -> Outcome:
    """The stage `reward`."""
    info = ModelInfo.read(config.model)
    if info.labels is None:
        info.require_causal()
    else:
        info.require_one_label()
    limit = length_limit(config, info)
    model_config = read_config(config.model)
    model_config.num_labels = 1
    pairs = [pair for path in config.pairs for pair in read_pairs(path)]
    prompts = {pair.pair_id: pair.prompt_id for pair in pairs}
    ledger = Ledger("pairs")
    rows = usable(
        (Row(pair.pair_id, pair_sequences(pair)) for pair in pairs),
        ledger,
        limit=limit,
        vocabulary=vocabulary_size(model_config),
        max_dropped=config.max_dropped,
        what="pairs",
    )
    held_out = held_out_prompts(set(prompts.values()), config.eval_fraction, config.seed)
    training = [row for row in rows if prompts[row.row_id] not in held_out]
    measured = [row for row in rows if prompts[row.row_id] in held_out]
    if not training:
        raise UserError(f"eval_fraction={config.eval_fraction} holds out all {len(rows)} pairs; lower it.")
    architecture = AutoModelForSequenceClassification._model_mapping[type(model_config)].__name__
    task = Task(
        rows=training,
        ledger=ledger,
        loss=reward_loss,
        load=lambda dtype: load_reward(config.model, dtype, config.seed),
        wrap=SequenceScore,
        auto=AutoModelForSequenceClassification,
        model_config=model_config,
        changes={
            "architectures": [architecture],
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
            "pad_token_id": padding_token(config, model_config),
        },
        held_out=measured,
        facts={"training_pairs": len(training), "held_out_pairs": len(measured)},
    )
    return fit(config, context, task)


def reward_loss(model: Any, rows: list[Row], weights: Tensor, totals: Totals) -> dict[str, Tensor]:
    """-log sigmoid(r_chosen - r_rejected), both scores read at the answer's last token."""
    batch = collate((sequence for row in rows for sequence in row.sequences), weights.device)
    chosen, rejected = model(batch.input_ids, batch.last).view(-1, 2).unbind(1)
    figures = {
        "loss": bradley_terry(chosen, rejected),
        "accuracy": (chosen > rejected).float(),
        "chosen_score": chosen.detach(),
        "rejected_score": rejected.detach(),
        "margin": (chosen - rejected).detach(),
    }
    return {name: (weights * value).sum() / totals.rows for name, value in figures.items()}


def held_out_prompts(prompts: set[str], fraction: float, seed: int) -> set[str]:
    """The share `fraction` of the prompts, decided by the seed and each prompt's id."""
    order = sorted(prompts, key=lambda prompt: (derive_seed("held out", seed, prompt), prompt))
    return set(order[: round(fraction * len(order))])


def padding_token(config: RewardConfig, model_config: Any) -> int:
    """The id that engines pad with; transformers refuses to score a batch by a model without one."""
    if model_config.pad_token_id is not None:
        return int(model_config.pad_token_id)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise UserError(
            f"the tokenizer of {config.model} has neither a padding nor an EOS token, so nobody could score a batch by "
            "the reward model. Set pad_token in its tokenizer_config.json."
        )
    return int(found)
