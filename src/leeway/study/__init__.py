"""The study file, data preparation, jobs, workers, and the run directory."""
