"""Model code shared by all stages: loading, packing, attention and log-probabilities. Requires torch."""
