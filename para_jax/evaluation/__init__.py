"""Scores of a backbone and its tenants on held-out rows."""
