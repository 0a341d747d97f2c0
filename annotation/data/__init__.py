"""Imports, exports, mixes and selects answers, pairs and scores."""
