"""Scorers, metrics with intervals, and the judges' errors."""
