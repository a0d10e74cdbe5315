"""`python -m megalite`: the same as the console script."""

from megalite.cli import main

main()
