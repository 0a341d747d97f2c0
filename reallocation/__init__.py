"""Parameters from one parallel layout to another: between processes, from files and in files. The core has no torch."""
