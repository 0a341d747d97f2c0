"""Runs stages: the driver, supervisors, and the executors that put them somewhere."""
