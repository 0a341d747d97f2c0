"""`pipeline doctor`: finds problems before a run starts that would stop it after hours."""
