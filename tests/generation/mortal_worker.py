"""A worker of vLLM that dies or stops."""

import os
import signal
from pathlib import Path
from typing import Any

from generation.weight_update import WeightUpdate, _poison


class Mortal(WeightUpdate):
    """Its last rank ends, or stops, with half of an update done, where a file says so."""

    def replace_weights(self, policy: str) -> dict[str, Any]:
        mark = Path(os.environ["MARK"])
        if mark.exists() and self.rank == int(os.environ["LAST"]):
            number = signal.Signals[mark.read_text()]
            mark.unlink()
            _poison(self.get_model())
            os.kill(os.getpid(), number)
        return super().replace_weights(policy)
