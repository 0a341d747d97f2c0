"""`python -m reallocation FIRST SECOND [BASE]`: compare two checkpoints and print one line of JSON."""

import os
import sys

# Ratchet's packages take precedence over modules of the same name in the working directory.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from contracts import entrypoint

if __name__ == "__main__":
    entrypoint.prepare()

import json
from pathlib import Path

from reallocation.comparing import comparison

if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    print(json.dumps(comparison(paths[0], paths[1], paths[2] if len(paths) > 2 else None)))
