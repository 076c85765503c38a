"""Paired comparison of checkpoints from logs of other evaluation tools."""
