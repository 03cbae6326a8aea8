"""Hosts, one file per model family: weights in, forward with a view."""
