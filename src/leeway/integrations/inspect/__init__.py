"""Inspect (inspect.aisi.org.uk): the evals as its tasks, finished runs as its logs."""
