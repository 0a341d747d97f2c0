"""Compares runs: what differs in their configs, and which policy is better, by how much."""
