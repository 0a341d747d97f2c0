"""Moves parameters between parallel layouts: between processes, from files, or from files to files.

Only `reallocation.live` needs torch.
"""
