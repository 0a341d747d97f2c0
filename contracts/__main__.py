"""`python -m contracts {prompts,draw}`: import prompts from where they are; draw those of an iteration."""

import os
import sys

# Ours before anything in the working directory that is called the same.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from contracts import surroundings

if __name__ == "__main__":
    surroundings.prepare()

from contracts.declaration import stages_of
from contracts.stage import main

if __name__ == "__main__":
    main(stages_of("contracts"), "contracts")
