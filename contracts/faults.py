"""Tolerates samples that could not be computed, up to the share `fail_on_error`; all of them are counted."""

from collections.abc import Callable
from dataclasses import dataclass

from contracts.errors import TransientError, UserError
from contracts.ledger import Ledger

FAILED = "failed"
"""Reason in the drop ledger: the sample could not be computed."""
SHOWN = 5


@dataclass(frozen=True)
class Fault:
    """The error of a sample that has no result; takes the place of the result."""

    error: Exception


class Faults:
    """The faults of a stage, or of one of its shards."""

    def __init__(self, limit: float) -> None:
        """`limit`: share of the samples that may fail; if 0, the first fault ends the stage with its own error."""
        self.limit = limit
        self.messages: list[str] = []
        """Messages of the first few faults, for the manifest."""

    def add(self, fault: Fault) -> None:
        """Record a fault, or raise its error if none is tolerated."""
        if self.limit == 0:
            raise fault.error
        if len(self.messages) < SHOWN:
            self.messages.append(f"{type(fault.error).__name__}: {fault.error}")

    def facts(self) -> dict[str, list[str]]:
        """Facts for the manifest: the first few messages, if there are any."""
        return {"failures": self.messages[:SHOWN]} if self.messages else {}

    def require_few(self, ledger: Ledger) -> None:
        """Raise UserError if a larger share than the limit has failed."""
        failed = ledger.dropped.get(FAILED, 0)
        if failed > self.limit * ledger.rows_in:
            raise UserError(
                f"{failed} of {ledger.rows_in} {ledger.unit} failed, more than fail_on_error={self.limit:g} allows. "
                f"The first: {'; '.join(self.messages[:2])}"
            )


class Tolerance:
    """Ends a stage as soon as too many samples have failed, for stages where each failure costs time or money."""

    def __init__(self, limit: float, total: Callable[[], float]) -> None:
        """`limit` as for `Faults`; `total` returns the number of samples, as far as it is known."""
        self.limit, self.total = limit, total
        self.failed = 0

    def record(self, fault: Fault) -> None:
        """Record a failure.

        Raises:
            Exception: the failure's own error, if none is tolerated.
            TransientError: too many have failed, and the last failure is transient.
            UserError: too many have failed.
        """
        if self.limit == 0:
            raise fault.error
        self.failed += 1
        total = self.total()
        if self.failed > self.limit * total:
            kind = TransientError if isinstance(fault.error, TransientError) else UserError
            raise kind(
                f"{self.failed} of {total} samples failed so far, more than fail_on_error={self.limit:g} allows. "
                f"The last: {fault.error}"
            )
