"""`python -m generation`: sample K answers per prompt with the current policy."""

from contracts.records import ROLLOUTS
from contracts.stage import Command, main
from generation.config import GenerationConfig

if __name__ == "__main__":
    main({"generation": Command(GenerationConfig, ROLLOUTS, "generation.run:run")}, "generation")
