"""Who answers prompts: one protocol, one file per backend."""
