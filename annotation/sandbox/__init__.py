"""Where programs that a model has written are run: in a process that can do little."""
