"""The stages of this package, each declared once: see contracts/declaration.py."""
