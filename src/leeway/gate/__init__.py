"""A release gate: rules on a finished run's checkpoints, each pass, fail or inconclusive."""

from leeway.gate.gate import decide_and_print, gate
from leeway.gate.output import Gate

__all__ = ["Gate", "decide_and_print", "gate"]
