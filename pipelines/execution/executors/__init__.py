"""The executors: one module per kind, found by its name (`executor: NAME`)."""
