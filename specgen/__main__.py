"""`python -m specgen` is `specgen`."""

from specgen.cli import main

main()
