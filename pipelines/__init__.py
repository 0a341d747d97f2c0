"""The driver: config, graph, executors, status, and the `pipeline` command."""
