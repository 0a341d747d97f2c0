"""Traces the provenance of artifacts and verifies their integrity: `pipeline trace` and `pipeline verify`."""
