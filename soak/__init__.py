"""Random use against what is right, for minutes: ``python -m soak``."""
