"""What a model computes, for whoever needs it: loading, packing, attention, log-probabilities. Needs torch."""
