"""Pushes a run's checkpoints, pairs, rollouts and report to the Hugging Face Hub."""
