"""Experience: scored samples as an algorithm trains on them."""

from contracts.declaration import Stage
from contracts.records import EXPERIENCE
from training.config import ExperienceConfig

MAKE_EXPERIENCE = Stage(ExperienceConfig, EXPERIENCE, "training.experience:run")
