"""Measurements, one command each, one JSON line a row."""
