"""`python -m embedded world output=DIR seed=0`."""

from contracts.records import WORLD
from contracts.stage import Command, main
from embedded.config import WorldConfig

if __name__ == "__main__":
    main({"world": Command(WorldConfig, WORLD, "embedded.world:run")}, "embedded")
