"""Selects preference pairs among the answers to each prompt. Needs no torch."""
