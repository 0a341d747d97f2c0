"""Shows what is known of runs: status, plans, simulations, reports, hooks and trackers. No result depends on it."""
