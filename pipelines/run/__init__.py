"""The directory of a run: what is in it, what has to be made, what may go."""
