"""Declarations of the annotation stages; see contracts/declaration.py."""
