"""What was asked (spec), what it takes (plan), carrying it out (run), and where it lies (store)."""
