"""Pairs or demonstrations in, a checkpoint out."""
