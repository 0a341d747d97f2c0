"""Where published things come from, and whether they still are what was published: `trace` and `verify`."""
