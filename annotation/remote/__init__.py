"""Scorers that call a server: a judge behind an OpenAI-compatible endpoint, or an HTTP service that returns rewards."""
