"""`python -m pipelines` is the `pipeline` command."""

import sys

from pipelines.main import main

sys.exit(main())
