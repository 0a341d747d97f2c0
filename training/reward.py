"""A Bradley-Terry reward model, trained on the token ids of pairs."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.seeds import derive_seed
from contracts.stage import Context, Outcome
from training.config import RewardConfig
from training.data import length_limit, pair_row, read_pairs, usable
from training.engines.base import Figures, Outputs
from training.fit import Task, fit
from training.loop import Learning, Part
from training.models import load_reward, read_config, vocabulary_size
from training.modules import SequenceScores


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
        map(pair_row, pairs),
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
    task = Task(
        ledger=ledger,
        learning=Learning(training, reward_loss, held_out=measured),
        load=lambda dtype: load_reward(config.model, dtype, config.seed),
        wrap=SequenceScores,
        auto=AutoModelForSequenceClassification,
        model_config=model_config,
        changes=classifier_changes(config.model, model_config),
        facts={"training_pairs": len(training), "held_out_pairs": len(measured)},
    )
    return fit(config, context, task)


def reward_loss(outputs: Outputs, part: Part) -> Figures:
    """-log sigmoid(r_chosen - r_rejected), both scores read at the answer's last token."""
    chosen, rejected = outputs["scores"].view(-1, 2).unbind(1)
    figures = {
        "loss": bradley_terry(chosen, rejected),
        "accuracy": (chosen > rejected).float(),
        "chosen_score": chosen.detach(),
        "rejected_score": rejected.detach(),
        "margin": (chosen - rejected).detach(),
    }
    return {name: part.weight * value.sum() / part.totals.rows for name, value in figures.items()}


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_w - r_l) per pair, [pairs] (Bradley & Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1)."""
    return -logsigmoid(chosen - rejected)


def held_out_prompts(prompts: set[str], fraction: float, seed: int) -> set[str]:
    """The share `fraction` of the prompts, decided by the seed and each prompt's id."""
    order = sorted(prompts, key=lambda prompt: (derive_seed("held out", seed, prompt), prompt))
    return set(order[: round(fraction * len(order))])


def classifier_changes(model: Path, model_config: Any) -> dict[str, Any]:
    """What differs in the config.json of a sequence classifier with one label from that of the model it began as."""
    return {
        "architectures": [AutoModelForSequenceClassification._model_mapping[type(model_config)].__name__],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": padding_token(model, model_config),
    }


def padding_token(model: Path, model_config: Any) -> int:
    """The id that engines pad with; transformers refuses to score a batch by a model without one."""
    if model_config.pad_token_id is not None:
        return int(model_config.pad_token_id)
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise UserError(
            f"the tokenizer of {model} has neither a padding nor an EOS token, so nobody could score a batch by "
            "the reward model. Set pad_token in its tokenizer_config.json."
        )
    return int(found)
