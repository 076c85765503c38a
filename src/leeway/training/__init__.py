"""The optimiser loop and the checkpoints it leaves."""
