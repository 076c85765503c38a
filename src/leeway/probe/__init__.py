"""Why a checkpoint drifted: directions, patching, adapter layers, mediation, persona vectors, depth in tokens."""
