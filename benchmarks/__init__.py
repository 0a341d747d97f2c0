"""Measurements of the whole project against others."""
