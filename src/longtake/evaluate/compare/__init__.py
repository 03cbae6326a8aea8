"""Comparing KV policies on the procedural world of lanes: protocols, cells, statistics and one report."""
