"""What is measured at a checkpoint: items to requests, responses to scores, one row each."""
