"""Trackers: send a run's curves, rates and page to W&B, MLflow, TensorBoard or trackio while it runs.

A tracker runs in a process of its own and reads what the run writes (step logs, parts, learning checks), whichever
process wrote it. So a tracker cannot slow or end a run, and a resumed run continues where the tracker stopped. It is an
option of the command, not of the study: it changes neither hash nor rows nor manifest.
"""
