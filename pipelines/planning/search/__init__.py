"""The search of plans: which strategy, pools and layouts a run is expected to take least time with."""
