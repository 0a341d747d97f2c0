"""Declarations of this package's stages; see contracts/declaration.py."""
