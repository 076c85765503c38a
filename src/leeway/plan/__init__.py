"""Estimate what a study takes before it runs: tokens, hours, memory, disk, dollars."""
