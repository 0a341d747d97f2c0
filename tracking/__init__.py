"""Sends a run's metrics to experiment trackers. Each tracker has its own process, which only reads the run."""
