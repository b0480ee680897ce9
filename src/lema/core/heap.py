"""Free memory of the C heap, given back to the system where much of it lies idle.

It knows glibc's allocator; where that is not in use it does nothing.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

_IDLE_BYTES = 192 << 20


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@functools.cache
def _glibc() -> tuple[Callable[[], _MallInfo], Callable[[int], int]] | None:
    try:
        library = ctypes.CDLL(None)
        info, trim = library.mallinfo2, library.malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    info.restype = _MallInfo
    return info, trim


def give_back_idle_heap() -> bool:
    """Return free heap pages to the system if more than 192 MiB lie idle; whether that was done.

    For the turns of a step, where what the next phase needs is of another shape than what the last one
    freed: activations of layers, then logits, then activations with their graph.
    """
    functions = _glibc()
    if functions is None or functions[0]().fordblks < _IDLE_BYTES:
        return False
    functions[1](0)
    return True
