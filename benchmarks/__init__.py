"""Benchmarks of Ratchet, most of them against other libraries."""
