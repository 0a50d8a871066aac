"""python -m qrefta: the command line."""

from qrefta.cli import main

main()
