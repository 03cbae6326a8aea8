"""`python -m longtake` is `longtake`."""

from .cli import main

if __name__ == "__main__":
    main()
