"""Trains reward models on pairs: a Bradley-Terry model, or a language model that compares two answers."""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.pairwise import PairwiseChat
from contracts.records import Pair
from contracts.seeds import derive_seed
from contracts.stage import Context, Outcome
from modeling.loading import load_causal, load_reward, read_config, vocabulary_size
from modeling.modules import SequenceScores, TokenLogprobs
from modeling.rows import Response, Row, token_ids
from training.algorithm import Metrics
from training.calibration import evaluate_pairs
from training.config import RewardConfig
from training.data import length_limit, pair_row, read_pairs, usable_rows
from training.engines.base import Outputs
from training.fit import TrainingTask, fit
from training.loop import HeldOut, Learning, MicroBatch
from training.models import classifier_changes

MakeRows = Callable[[Pair, bool], tuple[Row, ...]]
"""`make(pair, held_out)` returns the rows of a pair, which depend on whether it is held out."""


def run(config: RewardConfig, context: Context) -> Outcome:
    """Run the stage `reward`."""
    info = ModelInfo.read(config.model)
    pairwise = config.kind == "pairwise"
    if pairwise:
        info.require_causal()
    else:
        info.require_classifier_start()
    limit = length_limit(config, info)
    model_config = read_config(config.model)
    make: MakeRows
    if pairwise:
        info.require_chat_template()
        chat = PairwiseChat(config.model, config.chat_template_kwargs, config.date)
        make = partial(question_rows, chat=chat, seed=config.seed)
        model = {
            "load": lambda dtype, empty: load_causal(config.model, dtype, master=True, empty=empty),
            "wrap": TokenLogprobs,
            "auto": AutoModelForCausalLM,
        }
    else:
        model_config.num_labels = 1
        make = answer_rows
        model = {
            "load": lambda dtype, empty: load_reward(config.model, dtype, config.seed, master=True, empty=empty),
            "wrap": SequenceScores,
            "auto": AutoModelForSequenceClassification,
            "changes": classifier_changes(config.model, model_config),
        }
    pairs = [pair for path in config.pairs for pair in read_pairs(path)]
    held_out = held_out_prompts({pair.prompt_id for pair in pairs}, config.eval_fraction, config.seed)
    # The rows of each pair, by the id of its longest row, which decides whether the pair is usable.
    training: dict[int, tuple[Row, ...]] = {}
    evaluation: dict[int, tuple[Row, ...]] = {}

    def longest_rows() -> Iterator[Row]:
        for pair in pairs:
            is_held_out = pair.prompt_id in held_out
            rows = make(pair, is_held_out)
            row = max(rows, key=lambda row: row.longest)
            (evaluation if is_held_out else training)[id(row)] = rows
            yield row

    ledger = Ledger("pairs")
    kept = usable_rows(
        longest_rows(),
        ledger,
        limit=limit,
        vocabulary=vocabulary_size(model_config),
        max_dropped=config.max_dropped,
        what="pairs",
    )
    rows, held_out_rows = ([row for keep in kept for row in some.get(id(keep), ())] for some in (training, evaluation))
    if not rows:
        raise UserError(f"eval_fraction={config.eval_fraction} holds out all {len(kept)} pairs; lower it.")
    report = partial(evaluate_pairs, orders=2 if pairwise else 1)
    task = TrainingTask(
        ledger=ledger,
        learning=Learning(rows, reward_loss),
        held_out=HeldOut(held_out_rows, pair_scores, report) if held_out_rows else None,
        model_config=model_config,
        facts={"kind": config.kind, "training_pairs": len(rows), "held_out_pairs": len(kept) - len(rows)},
        **model,
    )
    return fit(config, context, task)


def answer_rows(pair: Pair, held_out: bool) -> tuple[Row, ...]:
    """The row of a pair for a Bradley-Terry model: both answers, each of which is scored at its last token."""
    return (pair_row(pair),)


def question_rows(pair: Pair, held_out: bool, *, chat: PairwiseChat, seed: int) -> tuple[Row, ...]:
    """Rows of a pair for a pairwise model: the question of which answer is better, with the right and the wrong label.

    The seed and the pair's id decide which answer comes first. A held-out pair is asked in both orders, with the chosen
    answer first and then with the rejected one first.

    Raises:
        UserError: the pair does not have the conversation that was answered.
    """
    if not pair.messages:
        raise UserError(
            f"pair {pair.pair_id} does not hold the conversation that was answered, which kind=pairwise needs: it was "
            "made by an earlier version. Make the pairs again."
        )
    in_front = derive_seed("first answer", seed, pair.pair_id) % 2 == 0
    return tuple(_question_row(pair, chat, order) for order in ((True, False) if held_out else (in_front,)))


def _question_row(pair: Pair, chat: PairwiseChat, chosen_first: bool) -> Row:
    first, second = (pair.chosen, pair.rejected) if chosen_first else (pair.rejected, pair.chosen)
    right, wrong = chat.label_ids if chosen_first else reversed(chat.label_ids)
    prompt = chat.token_ids(pair.messages, first, second, f"pair {pair.pair_id}", pair.tools)
    return Row(pair.pair_id, token_ids(prompt), (Response(token_ids([right])), Response(token_ids([wrong]))))


def pair_scores(outputs: Outputs, micro_batch: MicroBatch) -> Tensor:
    """Scores of each row's better and worse answer, [rows, 2]; a pairwise model's are the labels' log-probabilities."""
    return (outputs["scores"] if "scores" in outputs else outputs["logprobs"]).view(-1, 2)


def reward_loss(outputs: Outputs, micro_batch: MicroBatch) -> Metrics:
    """-log sigmoid(r_chosen - r_rejected).

    For a pairwise model that is -log p(right label | one of the two labels), because a label's score is its
    log-probability.
    """
    chosen, rejected = pair_scores(outputs, micro_batch).unbind(1)
    metrics = {
        "loss": bradley_terry(chosen, rejected),
        "accuracy": (chosen > rejected).float(),
        "chosen_score": chosen.detach(),
        "rejected_score": rejected.detach(),
        "margin": (chosen - rejected).detach(),
    }
    return {name: micro_batch.weight * value.sum() / micro_batch.totals.rows for name, value in metrics.items()}


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_w - r_l) per pair, [pairs] (Bradley & Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, eq. 1)."""
    return -logsigmoid(chosen - rejected)


def held_out_prompts(prompts: set[str], fraction: float, seed: int) -> set[str]:
    """Select the share `fraction` of the prompts, depending on the seed and each prompt's id alone."""
    order = sorted(prompts, key=lambda prompt: (derive_seed("held out", seed, prompt), prompt))
    return set(order[: round(fraction * len(order))])
