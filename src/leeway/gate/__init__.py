"""A release gate: rules on a finished run's checkpoints, each passed, failed, or not decided by the data."""

from leeway.gate.gate import gate
from leeway.gate.output import Gate

__all__ = ["Gate", "gate"]
