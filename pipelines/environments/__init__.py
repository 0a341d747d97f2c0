"""What stages run in: locked environments, or the user's own."""
