"""Sources, preference pairs, chat rendering, and one fixed order of batches."""
