"""Inspect (inspect.aisi.org.uk): the evals as its tasks, finished runs as its logs."""

from __future__ import annotations
