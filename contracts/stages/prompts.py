"""Prompts, imported from where they are."""

from contracts.declaration import Stage
from contracts.prompts import PromptsConfig
from contracts.records import PROMPTS

IMPORT_PROMPTS = Stage(PromptsConfig, PROMPTS, "contracts.importing:run", environment="annotation")
