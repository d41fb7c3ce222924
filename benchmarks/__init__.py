"""Measurements against the outside world, each run by hand; what they gave is in ``results``."""
