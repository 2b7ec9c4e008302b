"""`python -m arma_mergekit` is `arma`."""

from arma_mergekit.cli import main

main()
