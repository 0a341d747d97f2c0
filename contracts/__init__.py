"""The data that passes between stages, and how it is published: records, artifacts, configs, stage keys.

Imports neither torch nor vLLM when it is loaded.
"""
