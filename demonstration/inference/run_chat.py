"""Chat with a checkpoint in the [LEMA_REPLY] format: `lema chat`, whose options it takes."""

import sys

from lema.cli.app import main

if __name__ == "__main__":
    main(["chat", "--format", "lema-reply", *(sys.argv[1:] or ["checkpoints/final"])])
