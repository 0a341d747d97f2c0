"""Scorers that judge in processes of their own, which may hang, crash or be hostile."""
