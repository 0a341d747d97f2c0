"""Imports the supervisor's modules into the process that supervisors are forked from (contracts/warm.py)."""

from collections.abc import Sequence


def preload(libraries: Sequence[str]) -> None:
    """Import the supervisor; it needs none of the stages' libraries."""
    import pipelines.execution.supervisor  # noqa: F401
