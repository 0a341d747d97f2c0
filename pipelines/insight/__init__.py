"""What a run has to tell: readers that change nothing."""
