"""Gates: conditions on the metrics of an evaluation that warn, stop a run, or roll it back to its best policy."""
