"""Trains models on demonstrations, pairs or scored samples, and publishes them as checkpoints."""
