"""The drop ledger: counts the rows that came in, were kept, and were dropped, by reason."""

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from contracts.errors import UserError


class Ledger(msgspec.Struct):
    """Counts of one stage's units (prompts, samples, pairs); always `rows_in = kept + dropped`."""

    unit: str
    rows_in: int = 0
    kept: int = 0
    dropped: dict[str, int] = msgspec.field(default_factory=dict)

    def keep(self, count: int = 1) -> None:
        """Count units that came in and were kept."""
        self.rows_in += count
        self.kept += count

    def drop(self, reason: str, count: int = 1) -> None:
        """Count units that came in and were dropped for `reason`."""
        if count:
            self.rows_in += count
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def leave_out(self, reason: str, count: int) -> None:
        """Recount kept units as dropped for `reason`."""
        self.rows_in -= count
        self.kept -= count
        self.drop(reason, count)

    def check(self) -> None:
        """Raise AssertionError unless the counts add up: that is a bug in the stage, not a problem of the data."""
        total = self.kept + sum(self.dropped.values())
        if self.rows_in != total:
            raise AssertionError(f"{self.unit}: {self.rows_in} in, but {total} kept or dropped")

    def stop_above(
        self, limit: float, what: str, besides: str | None = None, fixes: Mapping[str, str] | None = None
    ) -> None:
        """Raise UserError if a larger share than `limit` was dropped, not counting the reason `besides`, which has its
        own limit.

        `fixes`: advice by reason; the message includes that for the most frequent one.
        """
        counted = {reason: count for reason, count in self.dropped.items() if reason != besides}
        if self.rows_in and sum(counted.values()) > limit * self.rows_in:
            fix = (fixes or {}).get(max(counted, key=lambda reason: counted[reason]), "Fix the inputs")
            raise UserError(
                f"{what}: {self} is more than max_dropped={limit:g} allows. "
                f"{fix} or raise max_dropped if this loss is intended."
            )

    def __str__(self) -> str:
        """`512 prompts in = 500 kept + 12 too_long`."""
        reasons = "".join(f" + {count} {reason}" for reason, count in sorted(self.dropped.items()))
        return f"{self.rows_in} {self.unit} in = {self.kept} kept{reasons}"


def merge(ledgers: Iterable[Ledger], unit: str) -> Ledger:
    """The sum of several shards' ledgers."""
    total = Ledger(unit)
    dropped: Counter[str] = Counter()
    for ledger in ledgers:
        total.rows_in += ledger.rows_in
        total.kept += ledger.kept
        dropped.update(ledger.dropped)
    total.dropped = dict(sorted(dropped.items()))
    return total
