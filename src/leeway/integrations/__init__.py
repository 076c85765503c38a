"""Other tools: Inspect, trainer callbacks."""
