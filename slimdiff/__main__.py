"""`python -m slimdiff`."""

from slimdiff.cli import main

if __name__ == "__main__":
    main()
