"""`python -m computron` is `computron`."""

from computron.cli import main

main()
