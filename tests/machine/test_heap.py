"""How the C heap is kept: for the whole process while a plan wants it so, and not a moment longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lema
from lema.machine import heap

pytestmark = pytest.mark.skipif(heap._glibc() is None, reason="needs glibc 2.33 or later")

BEGIN = """
import ctypes, gc
from lema.machine import heap
from lema.machine.heap import HeapGuard, apart_from_heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 64 << 20

def mapped():  # whether a large block has pages of its own, which go when it is freed
    global size
    size *= 2  # more than any hole that is left
    before = heap._glibc()[0]().hblkhd
    block = libc.malloc(size)
    after = heap._glibc()[0]().hblkhd
    libc.free(block)
    return after - before >= size
"""


def shown(code: str) -> list[str]:
    """What a process of its own, whose heap nobody else uses, prints."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code],
        env={"PYTHONPATH": str(Path(lema.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_large_blocks_are_kept_on_the_heap_until_the_guard_is_closed() -> None:
    assert shown("""
print(mapped())
guard = HeapGuard(1 << 50, keep_idle=True)
print(mapped())
with apart_from_heap():
    print(mapped())
print(mapped())
guard.close()
print(mapped())
guard.close()
""") == ["True", "False", "True", "False", "True"]


def test_a_guard_that_nobody_closed_goes_with_its_model() -> None:
    assert shown(
        "guard = HeapGuard(1 << 50, keep_idle=True); print(mapped()); del guard; gc.collect(); print(mapped())"
    ) == [
        "False",
        "True",
    ]


def test_a_guard_that_keeps_nothing_leaves_large_blocks_alone() -> None:
    assert (
        shown("guard = HeapGuard(1 << 50); print(mapped())\nwith apart_from_heap(): print(mapped())\nprint(mapped())")
        == ["True"] * 3
    )


def test_one_guard_that_goes_does_not_end_what_another_wants() -> None:
    code = """
first, second, third = HeapGuard(1 << 50, True), HeapGuard(1 << 50, True), HeapGuard(1 << 50)
del first
gc.collect()
third.close()
print(mapped())
second.close()
print(mapped())
"""
    assert shown(code) == ["False", "True"]
