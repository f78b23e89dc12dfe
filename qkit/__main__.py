"""`python -m qkit`: the command line."""

from qkit.cli import main

if __name__ == "__main__":
    main()
