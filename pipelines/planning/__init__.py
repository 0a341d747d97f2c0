"""Planning before a run starts: placement, estimates of memory and disk, simulation, search, and preflight checks."""
