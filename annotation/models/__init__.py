"""Models that score: how they are loaded, how they read answers, and what each kind of them says."""
