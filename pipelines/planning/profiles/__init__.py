"""Predicts the times and memory of stages, from profiles of earlier runs and data sheets of devices."""
