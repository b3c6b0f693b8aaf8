"""Run slimdiff from a checkout that is not installed: `python cli.py calibrate`."""

from slimdiff.cli import main

if __name__ == "__main__":
    main()
