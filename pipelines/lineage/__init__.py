"""Provenance and integrity of artifacts: `pipeline trace` and `pipeline verify`."""
