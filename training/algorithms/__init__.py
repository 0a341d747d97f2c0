"""The built-in algorithms, one file each; `training/algorithm.py` defines their interface."""
