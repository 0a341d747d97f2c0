"""`python -m pipelines.hub RUN`: the process that pushes a run's artifacts while the run is in progress."""

import os
import sys
from pathlib import Path

# This repository's packages take precedence over namesakes in the working directory or on PYTHONPATH.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from contracts import entrypoint

if __name__ == "__main__":
    entrypoint.prepare(stage=False)
    from pipelines.hub.background import follow

    follow(Path(sys.argv[1]))
