"""`pipeline doctor`: finds problems that would stop a run after hours, before it starts."""
