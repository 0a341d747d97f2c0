"""The stage pairs-sample: a random part of published pairs, to be trained on beside others."""

from annotation.data.mixing import PairsSampleConfig
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.fingerprint import digest
from contracts.joining import require_made_from
from contracts.ledger import Ledger
from contracts.records import PAIRS, ROLLOUTS, Pair
from contracts.stage import Context, Outcome

SHARD = "shard-00000.jsonl"


def run(config: PairsSampleConfig, context: Context) -> Outcome:
    """Publish the pairs that are taken, in their order."""
    source = Artifact.open(config.pairs, PAIRS)
    require_made_from(Artifact.open(config.rollouts, ROLLOUTS), source)
    pairs = list(source.rows(Pair))
    if not pairs:
        raise UserError(f"{config.pairs} holds no pairs, of which some are to be taken.")
    wanted = _wanted(config, len(pairs))
    order = sorted(range(len(pairs)), key=lambda number: digest([config.seed, pairs[number].pair_id]))
    taken = sorted(order[:wanted])
    ledger = Ledger("pairs")
    ledger.keep(len(taken))
    ledger.drop("not_drawn", len(pairs) - len(taken))
    context.publication.write_rows(SHARD, [pairs[number] for number in taken], ledger)
    return Outcome("pairs", {"wanted": wanted}, source.manifest.weights)


def _wanted(config: PairsSampleConfig, there: int) -> int:
    """How many pairs to take, one at least; of these there may be fewer."""
    if config.beside is None:
        return max(1, round(config.share * there))
    others = Artifact.open(config.beside, PAIRS).manifest.ledger.kept
    return max(1, round(others * config.share / (1 - config.share)))
