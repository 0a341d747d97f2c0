"""What stages took, and what they would take: profiles of runs, data sheets of devices, and predictions by both."""
