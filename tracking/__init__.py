"""Shows a run's metrics in the trackers that people watch: each is fed by a process of its own, which only reads."""
