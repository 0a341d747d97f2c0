"""A tiny model, and data that it can learn from."""

from contracts.declaration import Stage
from contracts.records import WORLD
from embedded.config import WorldConfig

MAKE_WORLD = Stage(WorldConfig, WORLD, "embedded.world:run", environment="training")
