"""Which answers to a prompt become preference pairs. No torch."""
