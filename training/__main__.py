"""`python -m training {sft,reward,value-head,experience,policy,critic,merge,ema}`."""

import os
import sys

# Ratchet's packages take precedence over modules of the same name in the working directory.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from contracts import entrypoint

if __name__ == "__main__":
    entrypoint.prepare()

from contracts.declaration import stages_of
from contracts.stage import main
from training.launch import exit_without_teardown, join_ranks

if __name__ == "__main__":
    with exit_without_teardown():
        join_ranks()
        main(stages_of("training"), "training")
