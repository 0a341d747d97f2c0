"""Where stages run: one module for each kind of executor, found by its name (`executor: NAME`)."""
