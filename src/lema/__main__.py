"""`python -m lema` is the command `lema`."""

from .cli.app import main

if __name__ == "__main__":
    main()
