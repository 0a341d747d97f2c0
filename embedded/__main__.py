"""`python -m embedded world | smollm2`: creates the toy task, or a small real model, without a model hub."""

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
    main(stages_of("embedded"), "embedded")
