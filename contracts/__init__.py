"""What passes between stages: records, manifests, the artifact store. Imports neither torch nor vLLM."""
