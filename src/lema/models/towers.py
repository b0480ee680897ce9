"""What of a model a row of text never reaches, left out of the skeleton: towers for images and sound, and layers that
attend to what comes out of them.

It knows modules and which of them a forward calls; it knows nothing of files or of what is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import UnsupportedError


class LeftOut(nn.Module):
    """Stands where a tower was; calling it says that rows hold text alone.

    Forwards of text ask some towers where they are and in what type, so it has these, and no parameters.
    """

    def __init__(self, path: str, tower: nn.Module) -> None:
        super().__init__()
        self.path, self.kind = path, type(tower).__name__
        self.config = getattr(tower, "config", None)
        self.nothing = nn.Buffer(next(tower.parameters()).new_empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.nothing.device

    @property
    def dtype(self) -> torch.dtype:
        """What the tower would compute in."""
        return self.nothing.dtype

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """`UnsupportedError`."""
        raise UnsupportedError(
            f"{self.path} ({self.kind}) is left out: LEMA trains and asks the text model of a checkpoint, and rows "
            "hold text alone"
        )


def leave_out_unreached(
    model: nn.Module, layers: Iterable[nn.Module], run: Callable[[], object]
) -> dict[str, nn.Module]:
    """Take out of a model what a forward does not call.

    Args:
        layers: what is in one that is called is kept, as they are replaced while the forward runs.
        run: the forward, of text.

    Returns:
        The modules taken out, by path; each is the largest of which no part with parameters is called.
    """
    called: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda m, _: called.add(m)) for module in model.modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    kept = called.union(*(layer.modules() for layer in layers if layer in called))
    for embeddings in (
        "get_input_embeddings",
        "get_output_embeddings",
    ):  # the head is not called where there are no rows
        module = getattr(model, embeddings)()
        if module is not None:
            kept.add(module)
    found = dict(_unreached(model, kept, ""))
    for path, module in found.items():
        parent, _, leaf = path.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = LeftOut(path, module)
    return found


def _unreached(module: nn.Module, kept: set[nn.Module], prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if kept.isdisjoint(child.modules()):
            if next(child.parameters(), None) is not None:
                yield path, child
        else:
            yield from _unreached(child, kept, f"{path}.")
