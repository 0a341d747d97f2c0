"""What supervisors import, for the process that they are forked from (contracts/warm.py)."""

from collections.abc import Sequence


def preload(libraries: Sequence[str]) -> None:
    """Import it, whatever their libraries."""
    import pipelines.execution.supervisor  # noqa: F401
