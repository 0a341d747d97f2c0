"""Runs stages: the driver, supervisors, and executors."""
