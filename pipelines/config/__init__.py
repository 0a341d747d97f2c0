"""Configurations, as the user writes them."""
