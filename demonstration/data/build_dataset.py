"""Build the data set, data/training_data.jsonl and data/held_out.jsonl: `lema data build`, whose options it takes."""

import sys

from lema.cli.app import main

if __name__ == "__main__":
    main(["data", "build", *sys.argv[1:]])
