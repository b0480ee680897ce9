"""Fetch log and outputs of USER/KERNEL, however it ended: `lema kaggle pull`, whose options it takes."""

import sys

from lema.cli.app import main

if __name__ == "__main__":
    main(["kaggle", "pull", "--any-state", *sys.argv[1:]])
