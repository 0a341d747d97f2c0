"""Runs beside each other: what differs in their configurations, and which policy is better by how much."""
