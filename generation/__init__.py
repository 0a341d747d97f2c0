"""Samples responses to prompts from the policy, and publishes them as rollouts."""
