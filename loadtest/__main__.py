"""`python -m loadtest` is `loraplex loadtest`."""

from loadtest.cli import main

if __name__ == "__main__":
    main()
