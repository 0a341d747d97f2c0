"""The annotation stages: score rollouts, select preference pairs, and evaluate policies."""
