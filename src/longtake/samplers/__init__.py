"""Samplers: how a chunk comes out of noise."""
