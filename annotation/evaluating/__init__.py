"""Evaluates policies: metrics with confidence intervals."""
