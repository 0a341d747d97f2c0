"""The algorithms, one file each; `training/algorithm.py` says what such a file holds."""
