"""What exists for the original LEMA's sake alone: its files, under its names. docs/compat.md lists all of it.

Paths that programs import from (`lema.core`, `lema.utils`, `lema.models.llama` and `gpt2`) are where they were.
"""
