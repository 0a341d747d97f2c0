"""Rollouts in; scores, pairs and evaluations out."""
