"""Searches for the plan of a run (strategy, pools, layouts) that is expected to take the least time."""
