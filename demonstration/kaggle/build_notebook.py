"""Write a notebook with all code inside to kaggle/NOTEBOOK: `lema kaggle build`, whose options it takes."""

import sys

from lema.cli.app import main

if __name__ == "__main__":
    named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    main(["kaggle", "build", *([] if named else ["llama2"]), *sys.argv[1:]])
