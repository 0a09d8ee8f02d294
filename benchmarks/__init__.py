"""Measurements: one command each, one JSON line per row."""
