"""Plans a run before it starts: placement, estimates of memory and disk, simulation, search, and preflight checks."""
