"""What a run will take, and what would go wrong, before it starts."""
