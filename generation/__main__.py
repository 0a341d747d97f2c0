"""`python -m generation`: sample K answers per prompt with the current policy."""

from contracts.records import ROLLOUTS
from contracts.stage import Command, main
from generation.config import GenerationConfig

COMMANDS = {"generation": Command(GenerationConfig, ROLLOUTS, "generation.run:run")}

if __name__ == "__main__":
    main(COMMANDS, "generation")
