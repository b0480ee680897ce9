"""The card of the machine a notebook runs on, and a torch that has kernels for it.

torch is only imported in other processes, so that it can still be replaced.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lema.errors import DeviceError

_ASK = """
import json, torch
n = torch.cuda.device_count()
print(json.dumps({
    "torch": torch.__version__, "count": n, "name": torch.cuda.get_device_name(0) if n else None,
    "capability": torch.cuda.get_device_capability(0) if n else None,
    "architectures": torch.cuda.get_arch_list() if n else [],
    "memory": torch.cuda.get_device_properties(0).total_memory if n else 0,
}))
"""
CU126 = "https://download.pytorch.org/whl/cu126"
_OLD_CARDS = (
    ["uninstall", "-y", "torch", "torchvision", "torchaudio"],  # left there, pip would find it will do
    ["install", "--quiet", "torch>=2.6,<2.15", "--index-url", CU126],
)
"""pip commands for cards below capability 7.0, whose kernels only the CUDA 12.6 builds before torch 2.15 have."""


@dataclass(frozen=True)
class Card:
    """What computes, as torch sees it."""

    torch: str
    count: int
    name: str | None
    capability: tuple[int, int] | None
    """None: there is no card, the CPU computes."""
    architectures: tuple[str, ...]
    """What torch was compiled for, as sm_75 or compute_90."""
    memory: int
    """Bytes of one card."""

    @property
    def device(self) -> str:
        """cuda or cpu."""
        return "cuda" if self.count else "cpu"

    @property
    def dtype(self) -> str:
        """bfloat16 where the card computes in it (capability 8.0 on), float16 on older ones, float32 on the CPU."""
        if self.capability is None:
            return "float32"
        return "bfloat16" if self.capability >= (8, 0) else "float16"

    @property
    def has_kernels(self) -> bool:
        """Whether this torch can run on this card."""
        return self.capability is None or _runs(self.capability, self.architectures)

    def __str__(self) -> str:
        if not self.count:
            return f"no card: the CPU computes, in {self.dtype} (torch {self.torch})"
        assert self.capability is not None
        several = f"; of {self.count} cards one is used" if self.count > 1 else ""
        return (
            f"{self.name}, {self.memory / 2**30:.1f} GiB, capability {'.'.join(map(str, self.capability))}, "
            f"in {self.dtype} (torch {self.torch}){several}"
        )


def prepare_card(ask: Callable[[], Card] | None = None, pip: Callable[[Sequence[str]], None] | None = None) -> Card:
    """The card, after torch was replaced by a build with kernels for it where the image's has none.

    Where there are several cards, as Kaggle's two T4, processes started from now on see the first one only.

    Args:
        ask, pip: stand-ins, in tests.

    Raises:
        DeviceError: no build of torch is known to have kernels for the card.
    """
    ask, pip = ask or _ask, pip or _pip
    card = ask()
    if card.count > 1:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if card.has_kernels:
        return card
    assert card.capability is not None
    what = f"torch {card.torch} has no kernels for {card.name} (it has {', '.join(card.architectures)})"
    if not (6, 0) <= card.capability < (7, 0):
        raise DeviceError(f"{what}; choose another accelerator: lema kaggle build NOTEBOOK --accelerator NvidiaTeslaT4")
    for command in _OLD_CARDS:
        pip(command)
    replaced = ask()
    if not replaced.has_kernels:
        raise DeviceError(f"{what}, and neither has torch {replaced.torch} from {CU126}; choose another accelerator")
    return replaced


def _runs(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Machine code runs on its own major version, from its minor on; PTX (compute_) on every later one.

    Source: CUDA C++ Programming Guide, binary and PTX compatibility.
    """
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name)
        if match is None:
            continue
        built = int(match[2]), int(match[3])
        if (match[1] == "sm" and built[0] == capability[0] and built[1] <= capability[1]) or (
            match[1] == "compute" and built <= capability
        ):
            return True
    return False


def _ask() -> Card:
    ended = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise DeviceError(f"torch cannot be asked about the card: {ended.stderr.strip()[-1000:]}")
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    capability = tuple(found.pop("capability")) if found["capability"] else found.pop("capability")
    return Card(capability=capability, architectures=tuple(found.pop("architectures")), **found)


def _pip(command: Sequence[str]) -> None:
    ended = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *command], check=False)
    if ended.returncode:
        raise DeviceError(
            f"pip {' '.join(command)} failed, see above; this card needs another torch than the image's, which comes "
            "from the internet. Turn it on, or build the notebook with --accelerator NvidiaTeslaT4"
        )
