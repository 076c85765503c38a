"""Integrations: Inspect, trainer callbacks."""
