"""Training examples, test items, prompts, chat templates, the order of examples, and the ledger."""
