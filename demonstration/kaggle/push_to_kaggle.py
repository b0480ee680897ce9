"""Push what build_notebook.py wrote, and run it there: `lema kaggle push`, whose options it takes."""

import sys

from lema.cli.app import main

if __name__ == "__main__":
    named = len(sys.argv) > 1 and not sys.argv[1].startswith("-")
    main(["kaggle", "push", *([] if named else ["kaggle/llama2"]), *sys.argv[1:]])
