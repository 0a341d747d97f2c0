"""Shows what is known of runs: status, plans, simulations, reports, hooks and trackers. Nothing here changes a run."""
