"""How fast and how lean: training, generation and a whole study against TRL and `generate` on the same machine."""
