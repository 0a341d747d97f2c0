"""Answers, pairs and scores that are put together, imported or exported."""
