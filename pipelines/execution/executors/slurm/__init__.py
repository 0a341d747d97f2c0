"""Runs stages as Slurm jobs."""
