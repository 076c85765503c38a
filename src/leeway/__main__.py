"""`python -m leeway`."""

from leeway.cli import main

main()
