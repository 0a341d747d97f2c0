"""The directory of a run: its layout, the decisions to reuse or run stages, events, and deletion."""
