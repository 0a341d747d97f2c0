"""One seed per (run, iteration, prompt, sample), derived, never drawn."""

import hashlib


def derive_seed(*parts: str | int) -> int:
    """A seed in [0, 2**31 - 1 - 2**16) from a path of names and numbers.

    The range leaves room for `seed + sample`, and fits every random generator in use.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % (2**31 - 1 - 2**16)
