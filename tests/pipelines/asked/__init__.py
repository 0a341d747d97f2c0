"""What runs in the forks of warm_asking.py."""
