"""What gates decide after an iteration."""

from dataclasses import dataclass

from annotation.gating.config import GateConfig
from contracts.declaration import Stage
from contracts.outlook import STAGE, Outlook
from contracts.records import GATE


@dataclass(frozen=True)
class Gate(Stage[GateConfig]):
    """The decision how a run goes on."""

    def published_bytes(self, config: GateConfig, outlook: Outlook) -> int:
        """A few numbers."""
        return STAGE


DECIDE = Gate(GateConfig, GATE, "annotation.gating.stage:run")
