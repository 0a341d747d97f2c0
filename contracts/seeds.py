"""Derives a seed per (run, iteration, prompt, sample) by hashing; no seed depends on the order of the work."""

import hashlib


def derive_seed(*parts: str | int) -> int:
    """Hash a path of names and numbers to a seed in [0, 2**31 - 1 - 2**16).

    The range leaves room for `seed + sample`, and fits every random generator in use.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % (2**31 - 1 - 2**16)
