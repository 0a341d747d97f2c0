"""Runs programs that a model has written, in a confined process."""
