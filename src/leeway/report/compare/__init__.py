"""Several studies: their effects side by side, pooled, and over studies."""
