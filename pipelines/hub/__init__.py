"""What a run pushes to the Hugging Face Hub."""
