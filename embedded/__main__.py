"""python -m embedded world | smollm2: data and models that need no hub."""

import os
import sys

# Ours before anything in the working directory that is called the same.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from contracts import surroundings

if __name__ == "__main__":
    surroundings.settle()


from contracts.records import CHECKPOINT, WORLD
from contracts.stage import Command, main
from embedded.config import Smollm2Config, WorldConfig

if __name__ == "__main__":
    main(
        {
            "world": Command(WorldConfig, WORLD, "embedded.world:run"),
            "smollm2": Command(Smollm2Config, CHECKPOINT, "embedded.smollm2:run"),
        },
        "embedded",
    )
