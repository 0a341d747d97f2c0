"""python -m contracts prompts: import prompts from where they are."""

from contracts.prompts import PromptsConfig
from contracts.records import PROMPTS
from contracts.stage import Command, main

if __name__ == "__main__":
    main({"prompts": Command(PromptsConfig, PROMPTS, "contracts.importing:run")}, "contracts")
