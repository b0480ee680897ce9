"""Watch USER/KERNEL until it has ended: `lema kaggle status`, whose options it takes."""

import sys

from lema.cli.app import main

if __name__ == "__main__":
    main(["kaggle", "status", *sys.argv[1:]])
