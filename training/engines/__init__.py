"""How a model is spread over processes; `base.py` says what the training loop asks of an engine."""
