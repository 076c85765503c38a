"""Audit checkpoints that were trained elsewhere against their base."""

from leeway.audit.run import audit

__all__ = ["audit"]
