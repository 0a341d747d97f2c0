"""python -m reallocation FIRST SECOND [BASE]: what differs between two checkpoints, as one line of JSON."""

import os
import sys

# Ours before anything in the working directory that is called the same.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from contracts import surroundings

if __name__ == "__main__":
    surroundings.prepare()

import json
from pathlib import Path

from reallocation.comparing import comparison

if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    print(json.dumps(comparison(paths[0], paths[1], paths[2] if len(paths) > 2 else None)))
