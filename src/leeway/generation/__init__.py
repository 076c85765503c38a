"""Backends that answer prompts: one protocol, one file per backend."""
