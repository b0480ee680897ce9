"""Train one epoch into checkpoints/, on from the newest checkpoint: `lema train` with a recipe; takes its options."""

import argparse
from importlib.resources import files
from pathlib import Path

from lema.cli.app import main


def settings_of(options: argparse.Namespace) -> list[str]:
    """What differs from the recipe, as `name=value`."""
    found = [] if options.model is None else [f"model_name_or_path={options.model}"]
    if options.single_file is not None:
        found.append(f"gbi_path={options.single_file}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", default="lema_reply_llama2_7b.yaml", help="of the package lema_reply")
    parser.add_argument("--model", help="hub id or folder; default: the recipe's")
    parser.add_argument("--single_file", type=Path, help="base weights in one file, made if it is missing")
    options, others = parser.parse_known_args()
    recipe = str(files("lema_reply") / "recipes" / options.recipe)
    if options.single_file is not None and not options.single_file.exists():
        from lema.prepare.single_file import prepare_monolithic_safetensors
        from lema.training.run_config import RunConfig

        name = options.model or RunConfig.from_yaml(recipe).lema.model_name_or_path
        prepare_monolithic_safetensors(name, options.single_file, device="cpu")
    given = [word for setting in settings_of(options) for word in ("--set", setting)]
    main(["train", recipe, "--resume", "auto", *given, *others])
