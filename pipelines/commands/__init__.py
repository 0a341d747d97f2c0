"""The commands of `pipeline`, each declared next to its implementation."""
