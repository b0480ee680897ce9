"""Merge an adapter into its base, as a model that transformers loads: `lema merge`, whose options it takes."""

import argparse

from lema.cli.app import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="checkpoints/final")
    parser.add_argument("--output", required=True, help="directory to make")
    parser.add_argument("--base_model", help="directory, .safetensors file or hub id; default: as the checkpoint says")
    options, others = parser.parse_known_args()
    base = [] if options.base_model is None else ["--base", options.base_model]
    main(["merge", options.checkpoint, options.output, *base, *others])
