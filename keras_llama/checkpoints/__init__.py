"""Checkpoints of other projects, in and out: one table of names, one file per format."""
