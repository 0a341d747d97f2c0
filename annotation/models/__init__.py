"""Scorers with a model: loading, batching, forward passes, and one module for each kind."""
