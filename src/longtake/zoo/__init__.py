"""Embedded tiny models: the procedural world they learn, their training, and the shipped weights."""
