"""Runs scoring functions in worker processes, since they may hang, crash or be hostile."""
