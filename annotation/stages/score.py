"""One scorer's judgement of every answer."""

from annotation.config import ScoreConfig
from contracts.declaration import Stage
from contracts.records import SCORES

SCORE = Stage(ScoreConfig, SCORES, "annotation.scoring:run")
