"""Loading, adapters, and the statistics of target tokens that every objective is made of."""
