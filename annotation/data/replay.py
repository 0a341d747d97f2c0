"""The stage pairs-sample: draws a random part of published pairs, to be mixed into the training set."""

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
    """Publish the drawn pairs, in their original order."""
    source = Artifact.open(config.pairs, PAIRS)
    require_made_from(Artifact.open(config.rollouts, ROLLOUTS), source)
    pairs = list(source.rows(Pair))
    if not pairs:
        raise UserError(f"{config.pairs} holds no pairs to draw from.")
    wanted = _wanted(config, len(pairs))
    order = sorted(range(len(pairs)), key=lambda number: digest([config.seed, pairs[number].pair_id]))
    drawn = sorted(order[:wanted])
    ledger = Ledger("pairs")
    ledger.keep(len(drawn))
    ledger.drop("not_drawn", len(pairs) - len(drawn))
    context.publication.write_rows(SHARD, [pairs[number] for number in drawn], ledger)
    return Outcome("pairs", {"wanted": wanted}, source.manifest.weights)


def _wanted(config: PairsSampleConfig, available: int) -> int:
    """Number of pairs to draw, at least one; the artifact may hold fewer."""
    if config.beside is None:
        return max(1, round(config.share * available))
    others = Artifact.open(config.beside, PAIRS).manifest.ledger.kept
    return max(1, round(others * config.share / (1 - config.share)))
