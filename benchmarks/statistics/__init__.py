"""Simulations with known truth: what the tests and intervals of `leeway.stats` really do."""
