"""Preference pairs, chosen by scores."""

from annotation.config import PairsConfig
from contracts.declaration import Stage
from contracts.records import PAIRS

CHOOSE_PAIRS = Stage(PairsConfig, PAIRS, "annotation.pairs:run")
