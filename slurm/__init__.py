"""Profiles of clusters (YAML), and the rehearsal cluster."""
