"""`pipeline doctor`: what would stop a run after hours, found before it starts."""
