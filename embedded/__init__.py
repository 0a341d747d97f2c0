"""The embedded toy task with its own data, model and gold scorer, generated in seconds."""
