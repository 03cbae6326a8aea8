"""MAGI-1 (4.5B base and distill): chunks of 24 frames, four in flight at different noise levels."""
