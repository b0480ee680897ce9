"""What a machine can do: sizes of its memories in bytes, rates of disk, link and arithmetic; measured or stated.

It knows numbers, files of them and a few cards' data sheets; it knows nothing of this machine, models or plans.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, DeviceError
from ..json_file import parse_object
from ..machine.choices import DTYPES
from ..machine.memory import format_bytes, parse_bytes

__all__ = ["CARDS", "Card", "Hardware", "format_bytes", "parse_bytes"]

SOURCES = ("measured", "stated")
_OFTEN = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")  # what a misspelt device may have been meant to be


@dataclass(frozen=True)
class Hardware:
    """One machine, as the memory plan sees it. Bad values raise `ConfigError` at construction."""

    name: str
    """For people: the card's or the processor's."""
    device: str
    """Where layers are computed: 'cpu', or a kind of accelerator as torch names it ('cuda', 'xpu')."""
    vram_bytes: int
    """Memory of the device; 0 on the CPU."""
    ram_bytes: int
    """Memory of the host, or as much of it as the process may take."""
    disk_bytes_per_s: float
    """Long sequential reads of the disk that holds the model."""
    link_bytes_per_s: float
    """Pinned host memory to device; infinite on the CPU, where nothing has to cross."""
    flops: Mapping[str, float] = field(hash=False)
    """FLOP/s sustained in matrix products as large as a layer's, by type ('float32', 'bfloat16', 'float16')."""
    source: str = "stated"
    """'measured' here, or 'stated' by a user or a data sheet."""

    def __post_init__(self) -> None:
        _check_device_kind(self.device)
        _check_one_of("source", self.source, SOURCES)
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError("hardware: name is empty: say which machine this is")
        if not isinstance(self.flops, Mapping) or not self.flops:
            raise ConfigError(f"hardware: flops={self.flops!r} must give FLOP/s for one of {', '.join(DTYPES)} or more")
        for dtype in self.flops:
            _check_one_of("type of flops", dtype, DTYPES)
        object.__setattr__(self, "flops", dict(self.flops))
        positive: dict[str, float] = {"ram_bytes": self.ram_bytes, "disk_bytes_per_s": self.disk_bytes_per_s}
        positive |= {f"flops[{dtype!r}]": rate for dtype, rate in self.flops.items()}
        if self.device == "cpu":
            if self.vram_bytes != 0 or self.link_bytes_per_s != math.inf:
                raise ConfigError("hardware: device='cpu' has vram_bytes=0 and an infinite link: leave both out")
        else:
            positive |= {"vram_bytes": self.vram_bytes, "link_bytes_per_s": self.link_bytes_per_s}
        for name, value in positive.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"hardware: {name}={value!r} must be a number above 0")
            if name.endswith("_bytes") and not isinstance(value, int):
                raise ConfigError(f"hardware: {name}={value!r} must be a whole number of bytes")

    def __str__(self) -> str:
        link = "" if self.device == "cpu" else f", link {format_bytes(int(self.link_bytes_per_s))}/s"
        vram = "" if self.device == "cpu" else f"{format_bytes(self.vram_bytes)} VRAM, "
        rates = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in self.flops.items())
        return (
            f"{self.name}: {vram}{format_bytes(self.ram_bytes)} RAM, disk {format_bytes(int(self.disk_bytes_per_s))}/s"
            f"{link}, {rates} ({self.source})"
        )

    def flops_for(self, dtype: str) -> float:
        """FLOP/s in one type; `DeviceError` where the machine does not compute in it."""
        if dtype not in self.flops:
            raise DeviceError(f"{self.name} does not compute in {dtype}: choose dtype={' or '.join(self.flops)}")
        return self.flops[dtype]

    def to_json(self) -> str:
        """The machine as JSON; an infinite link is null."""
        values = dataclasses.asdict(self)
        if math.isinf(self.link_bytes_per_s):
            values["link_bytes_per_s"] = None
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "hardware") -> Hardware:
        """The machine `to_json` wrote, or one written by hand. `where` names the text in messages."""
        values = parse_object(text, where, ConfigError)
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"{where}: {_unknown('setting', name, known)}")
        if values.get("device") == "cpu":
            values.setdefault("vram_bytes", 0)
            if values.get("link_bytes_per_s") is None:
                values["link_bytes_per_s"] = math.inf
        if missing := [name for name in known if name not in values and name != "source"]:
            raise ConfigError(f"{where}: {', '.join(missing)} missing")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {str(error).removeprefix('hardware: ')}") from error

    @classmethod
    def parse(cls, spec: str | os.PathLike[str], base: Hardware | None = None) -> Hardware:
        """A machine from a JSON file, or from words such as "rtx4090-24g,ram=64GB,disk=7GB/s".

        Words are a card of `CARDS`, and settings that add to it or change it: `vram`, `ram` in bytes,
        `disk`, `link` in bytes a second or `link=pcie4` (`pcie4x8`), `flops` of every type, `fp32`,
        `bf16`, `fp16` of one, `device` as torch names it, `name`. Without `device` a machine with card, vram
        or link computes on 'cuda', another one on the CPU.

        Args:
            base: gives what the words leave out (the link, VRAM and arithmetic only if its device is the same).

        Raises:
            ConfigError: an unknown or missing setting, or a bad value.
        """
        spec = os.fspath(spec)
        if spec.lower().endswith(".json") or os.path.isfile(spec):
            return cls.from_json(_read(Path(spec)), where=spec)
        return _from_words(spec, base)


# -- words ---------------------------------------------------------------------------------------


def _from_words(spec: str, base: Hardware | None) -> Hardware:
    card: Card | None = None
    settings: dict[str, Any] = {}
    rates: dict[str, float] = {}
    for word in filter(None, (part.strip() for part in spec.split(","))):
        key, equals, text = (part.strip() for part in word.partition("="))
        key = key.lower()
        if not equals or key == "card":
            card = _card(text or key)
        elif key in _SETTINGS:
            name, parse = _SETTINGS[key]
            settings[name] = parse(text, key)
        elif key in _TYPE_KEYS:
            rates[_TYPE_KEYS[key]] = _parse_flops(text, key)
        else:
            raise ConfigError(f"hardware={spec!r}: {_unknown('setting', key, [*_SETTINGS, *_TYPE_KEYS, 'card'])}")
    every_type = rates.pop("", None)

    known: dict[str, Any] = {"name": spec, "device": "cpu" if base is None else base.device}
    has_device = card is not None or settings.get("vram_bytes") or "link_bytes_per_s" in settings
    if card is not None or (has_device and known["device"] == "cpu"):
        known["device"] = "cuda"
    known["device"] = settings.pop("device", known["device"])
    if base is not None:
        known |= {"ram_bytes": base.ram_bytes, "disk_bytes_per_s": base.disk_bytes_per_s}
        if base.device == known["device"]:
            known |= {"vram_bytes": base.vram_bytes, "link_bytes_per_s": base.link_bytes_per_s, "flops": base.flops}
    if card is not None:
        known |= {"vram_bytes": card.vram_bytes, "link_bytes_per_s": parse_link(card.link), "flops": card.flops}
    if known["device"] == "cpu":
        known |= {"vram_bytes": 0, "link_bytes_per_s": math.inf}
    flops = known.get("flops", {})
    if every_type is not None:
        flops = dict.fromkeys(flops or DTYPES, every_type)
    if flops or rates:
        known["flops"] = {**flops, **rates}
    known |= settings
    if missing := [key for key, field_name in _WANTED.items() if field_name not in known]:
        raise ConfigError(
            f"hardware={spec!r} does not say {', '.join(missing)}: "
            f"add {','.join(f'{key}={_EXAMPLES[key]}' for key in missing)} with your numbers"
        )
    return Hardware(**known)


def _parse_rate(text: str, setting: str) -> float:
    return float(parse_bytes(text.strip().lower().removesuffix("/s"), setting))


def parse_link(text: str, setting: str = "link") -> float:
    """Bytes a second of "pcie4" (16 lanes), "pcie4x8" or "12GB/s"; `ConfigError` otherwise."""
    match = re.fullmatch(r"pcie([345])(?:x(1|2|4|8|16))?", text.strip().lower())
    if match is not None:
        return _LANE_BYTES_PER_S[match[1]] * int(match[2] or 16)
    if text.strip().lower().startswith("pcie"):
        raise ConfigError(f"{setting}={text!r} is unknown: choose pcie3, pcie4 or pcie5, with x1, x2, x4, x8 or x16")
    return _parse_rate(text, setting)


def _parse_flops(text: str, setting: str) -> float:
    match = _FLOPS.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(f"{setting}={text!r} is not a rate: write a number and G, T or P, as in 80T")
    return float(match[1]) * {"g": 1e9, "t": 1e12, "p": 1e15}[match[2]]


def _parse_name(text: str, _: str) -> str:
    return text


_FLOPS = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([gtp])(?:flops|flop/s)?")
_SETTINGS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "vram": ("vram_bytes", parse_bytes),
    "ram": ("ram_bytes", parse_bytes),
    "disk": ("disk_bytes_per_s", _parse_rate),
    "link": ("link_bytes_per_s", parse_link),
    "device": ("device", _parse_name),
    "name": ("name", _parse_name),
}
_TYPE_KEYS = {"flops": "", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_WANTED = {key: name for key, (name, _) in _SETTINGS.items()} | {"flops": "flops"}
_EXAMPLES = {"vram": "8GB", "ram": "32GB", "disk": "3GB/s", "link": "pcie4", "flops": "20T"}

# Bytes a second of one lane, after packet headers, one way: 0.75, 1.5, 3 GB. This is what NCCL reckons with
# (kvDictPciGen: 6, 12, 24 Gbit/s a lane; its author on the difference to the line rate: github.com/NVIDIA/nccl
# issue 1206). Sixteen lanes give 12, 24, 48 GB/s. Reported were 11.7 to 12.2 (P100, gen 3, pinned memory;
# microway.com), 25 (A100, gen 4; the BaM paper) and, towards the host, 53 (H100, gen 5; nvbandwidth issue 24).
_LANE_BYTES_PER_S = {"3": 0.75e9, "4": 1.5e9, "5": 3e9}


def _read(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ConfigError(f"hardware={str(path)!r} is not a file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hardware={str(path)!r} cannot be read: {error}") from error


def _check_one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"hardware: {_unknown(name, value, known)}")


def _check_device_kind(kind: object) -> None:
    """Refuse what torch does not know, what is no place to compute, and one card of several."""
    if not isinstance(kind, str):
        raise ConfigError(f"hardware: device={kind!r} is unknown: write 'cpu', or an accelerator's name as in 'cuda'")
    try:
        known = torch.device(kind).type
    except RuntimeError as error:
        raise ConfigError(f"hardware: {_unknown('device', kind, _OFTEN)} (torch: {error})") from error
    if known != kind or kind == "meta":
        raise ConfigError(
            f"hardware: device={kind!r} is no kind of device: write 'cpu', or as in 'cuda' without a number"
        )


def _unknown(what: str, value: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(value).lower(), known, n=1, cutoff=0.5)
    return f"{what} {value!r} is unknown" + (f"; did you mean {close[0]!r}?" if close else f": {', '.join(known)}")


# -- cards ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """What the vendor's data sheet says of a card, and how much of it large matrix products sustain.

    Rates are dense, in FLOP/s. Half types are with fp32 accumulation, which is what torch computes:
    GeForce cards do that at half the rate their pages advertise. float32 is without TF32, torch's default.
    """

    vram_bytes: int
    link: str
    half: float
    half_share: float
    single: float
    single_share: float
    bfloat16: bool = True

    @property
    def flops(self) -> dict[str, float]:
        """Sustained FLOP/s by type."""
        half = self.half * self.half_share
        rates = {"float32": self.single * self.single_share, "float16": half}
        return rates | ({"bfloat16": half} if self.bfloat16 else {})


# VRAM: the sheet's figure in GB of 10^9 bytes; the 5 to 7 % that a GiB is more is about what driver and
# context take. Shares are rounded down from torch matmuls of 4096 to 10240 rows as people reported them in
# github.com/zzc0721/torch-performance-test-data (its number in brackets), and for A100 and H100 from the table
# of maximum achievable FLOPS in stas00/ml-engineering.
CARDS: Mapping[str, Card] = {
    # "NVIDIA T4" data sheet: 65 and 8.1 T, gen 3 x16. Its 70 W hold fp16 at 24 T (an NVIDIA engineer's word,
    # forums.developer.nvidia.com/t/264462); short runs showed 42 T, and 4.2 T in float32 (database.md).
    # 16 GB with ECC on leave 15. No bf16 arithmetic: compute capability 7.5.
    "t4": Card(15 * 10**9, "pcie3", 65e12, 0.37, 8.1e12, 0.5, bfloat16=False),
    # "NVIDIA Tesla P100" data sheet, PCIe: 18.7 and 9.3 T, gen 3 x16. No tensor cores; torch's fp16 products
    # accumulate in fp32 and reach 7.2 to 8.4 T, no more than float32's 8.1 to 8.6 (#164, #174).
    "p100": Card(16 * 10**9, "pcie3", 18.7e12, 0.4, 9.3e12, 0.85, bfloat16=False),
    # GeForce product pages: 28 SMs at 1.78 GHz, 13 T single, gen 4 x16; 512 fp16 multiply-adds a clock and SM
    # the "NVIDIA Ampere GA102" white paper, halved for fp32 accumulation: 25.5 T. Measured 24 to 25, 6.4 to 8.2 (#131).
    "rtx3060-12g": Card(12 * 10**9, "pcie4", 25.5e12, 0.9, 12.7e12, 0.55),
    # GeForce product pages: 24 SMs at 2.46 GHz, 15 T single, 8 lanes of gen 4; 30 T by the same count
    # ("NVIDIA Ada GPU Architecture"). Measured 30 to 31 and 7.4 to 8.1 (#66).
    "rtx4060-8g": Card(8 * 10**9, "pcie4x8", 30e12, 0.9, 15.1e12, 0.5),
    # "NVIDIA Ada GPU Architecture", appendix A: 97.5 and 48.7 T, gen 4 x16. Shares as for the 4090.
    "rtx4080-16g": Card(16 * 10**9, "pcie4", 97.5e12, 0.9, 48.7e12, 0.6),
    # The same: 165.2 and 82.6 T, gen 4 x16. Measured 152 to 168 and 51 to 53 (#78).
    "rtx4090-24g": Card(24 * 10**9, "pcie4", 165.2e12, 0.9, 82.6e12, 0.6),
    # "NVIDIA A100" data sheet: 312 and 19.5 T, gen 4 x16. Measured on the 40 GB PCIe card 198 to 241 and
    # 15.5 to 17.6 (#108), best shape of the 80 GB one 253.
    "a100-40g": Card(40 * 10**9, "pcie4", 312e12, 0.65, 19.5e12, 0.8),
    # "NVIDIA H100" data sheet, SXM: 989 T (half the figure with sparsity) and 67 T, gen 5 x16. Best shape 794;
    # 760 to 790 in database.md. Its float32 share is a guess by the A100's.
    "h100": Card(80 * 10**9, "pcie5", 989e12, 0.75, 67e12, 0.7),
}


def _card(name: str) -> Card:
    card = CARDS.get(name.lower())
    if card is None:
        raise ConfigError(f"hardware: {_unknown('card', name, [*CARDS])} (settings are written name=value: vram=24GB)")
    return card
