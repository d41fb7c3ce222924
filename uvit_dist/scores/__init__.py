"""Scores of generated images from features: pure functions of arrays."""
