"""Where a study's jobs run: this machine or a Ray cluster."""
