"""Scorers that ask a server: a judge behind an OpenAI-compatible endpoint, or a service that gives rewards."""
