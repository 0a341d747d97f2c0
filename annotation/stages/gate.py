"""Declares the stage `gate`: decides by the gates how a run continues after an iteration."""

from dataclasses import dataclass

from annotation.gating.config import GateConfig
from contracts.declaration import Stage
from contracts.outlook import STAGE_BYTES, Outlook
from contracts.records import GATE


@dataclass(frozen=True)
class Gate(Stage[GateConfig]):
    """The decision on how a run continues."""

    def published_bytes(self, config: GateConfig, outlook: Outlook) -> int:
        """Size of the decision, which has only a few numbers."""
        return STAGE_BYTES


DECIDE = Gate(GateConfig, GATE, "annotation.gating.stage:run")
