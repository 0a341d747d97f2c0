"""Entry point of the annotation stages: `python -m annotation {score,pairs,evaluate,evaluate-checkpoint,rlhflow-export,
rlhflow-import,rlhflow-scores,preferences-import,preferences-scores,pairs-sample,select,select-scores}`."""

import os
import sys

# Ratchet's packages take precedence over modules of the same name in the working directory.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from contracts import entrypoint

if __name__ == "__main__":
    entrypoint.prepare()

from contracts.declaration import stages_of
from contracts.stage import main

if __name__ == "__main__":
    main(stages_of("annotation"), "annotation")
