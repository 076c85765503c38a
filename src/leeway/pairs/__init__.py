"""Preference pairs: where the rejected answers of a study come from."""
