"""`python -m longtake` is `longtake`."""

from .cli import main

main()
