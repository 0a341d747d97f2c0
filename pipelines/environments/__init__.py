"""The environments that stages run in: locked ones, or the user's own."""
