"""Policy and prompts in, rollouts out."""
