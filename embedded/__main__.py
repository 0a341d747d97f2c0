"""python -m embedded world | smollm2: data and models that need no hub."""

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
