"""The embedded default: a small world with its own data, models and gold scorer, made in seconds."""
