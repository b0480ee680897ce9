"""How Sphinx builds the documentation: `make docs` writes docs/_build/html."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

from sphinx.application import Sphinx

import lema
import lema.config
import lema.data.config
import lema.training.config

project = "LEMA"
author = "LEMA contributors"
copyright = author
version = release = lema.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 4
# Prose quotes what commands say; its dashes and quotation marks must stay what was typed.
smartquotes = False
# Docstrings put code between single backticks.
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"LEMA {release}"
html_copy_source = False
html_show_sphinx = False


# Napoleon takes what stands before a colon in an attribute's first line for its type; ours are sentences.
_COLON = "\ue000"


def _hide_colons(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    if what in ("attribute", "data", "property") and lines:
        lines[0] = lines[0].replace(":", _COLON)


def _show_colons(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def _without_bounds(cls: Any) -> None:
    """Leave the types in the hints of a class of settings: bounds are in the line under each field."""
    bare = typing.get_type_hints(cls)
    cls.__signature__ = inspect.Signature(
        [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(cls).parameters.values()]
    )
    cls.__annotations__ = {name: bare[name] for name in vars(cls).get("__annotations__", {})}


def setup(app: Sphinx) -> None:
    """Called by Sphinx: napoleon's own turn is at priority 500."""
    for module in (lema.config, lema.data.config, lema.training.config):
        for thing in list(vars(module).values()):
            if dataclasses.is_dataclass(thing) and getattr(thing, "__module__", None) == module.__name__:
                _without_bounds(thing)
    app.connect("autodoc-process-docstring", _hide_colons, priority=400)
    app.connect("autodoc-process-docstring", _show_colons, priority=600)
