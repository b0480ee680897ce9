"""What gathered facts mean, one small pure function a subject: Python, libraries, torch and the devices it computes on.

What LEMA needs and does well with stands here; the facts are all that is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ..machine.memory import format_bytes
from .facts import Device, Facts
from .finding import Finding, Level, advice, ok, problem
from .resources import GB, check_codes, check_hub, check_memory, check_pinning, check_places, check_rates, check_swap

_INDEX = "https://download.pytorch.org/whl"
# CUDA's release notes, "CUDA Toolkit and minimum required driver version for minor version compatibility".
_LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580"}


def examine(facts: Facts) -> list[Finding]:
    """All findings, subject by subject."""
    checks = (
        check_python, check_libraries, check_torch, check_kernels, check_dtype, check_memory, check_swap,
        check_pinning, check_rates, check_codes, check_places, check_hub,
    )  # fmt: skip
    return [finding for check in checks for finding in check(facts)]


def check_python(facts: Facts) -> Iterator[Finding]:
    """Python against the package's bounds."""
    if Version(facts.python) in SpecifierSet(facts.python_bounds):
        yield ok("python", facts.python)
    else:
        yield problem(
            "python", f"{facts.python}, and LEMA needs {facts.python_bounds}", "make a new environment: uv venv -p 3.12"
        )


def check_libraries(facts: Facts) -> Iterator[Finding]:
    """Libraries against the package's bounds; optional ones only where they are installed."""
    good = []
    for library in facts.libraries:
        fix = f"pip install '{library.name}{library.bounds}'"
        if library.installed is None:
            if not library.optional:
                yield problem("libraries", f"{library.name} is not installed", fix)
        elif not SpecifierSet(library.bounds).contains(library.installed, prereleases=True):
            level = Level.ADVICE if library.optional else Level.PROBLEM
            message = f"{library.name} {library.installed} is installed, and LEMA is made for {library.bounds}"
            yield Finding(level, "libraries", message, fix)
        else:
            good.append(f"{library.name} {library.installed}")
    if good:
        yield ok("libraries", ", ".join(good))


def check_torch(facts: Facts) -> Iterator[Finding]:
    """torch's build against the card and its driver."""
    build = facts.torch
    built = f"torch {build.version}"
    if build.devices:
        names = ", ".join(f"{d.name} ({format_bytes(d.free_bytes)} of {format_bytes(d.total_bytes)} free)"
                          for d in build.devices)  # fmt: skip
        yield ok("device", names)
    elif facts.nvidia_nodes and build.cuda is None:
        yield problem(
            "device",
            f"{built} is built without CUDA, and this machine has an NVIDIA card ({', '.join(facts.nvidia_nodes)})",
            f"pip install --force-reinstall torch --index-url {_INDEX}/{_cuda_index(facts.nvidia_driver)}",
        )
    elif facts.nvidia_nodes and build.cuda is not None:
        yield _silent_card(facts, built, build.cuda)
    elif build.cuda is not None and facts.nvidia_driver == "" and build.error:
        yield advice(
            "device",
            f"{built} is built with CUDA, and there is no NVIDIA driver: it computes on the CPU",
            "set device: cpu; in a container, start it with --gpus all",
        )
    elif facts.amd_node and build.hip is None:
        yield problem(
            "device",
            f"{built} is built without ROCm, and this machine has an AMD card (/dev/kfd)",
            f"pip install --force-reinstall torch --index-url {_INDEX}/rocm6.4",
        )
    else:
        yield advice("device", "no accelerator: it computes on the CPU", "set device: cpu")


def _silent_card(facts: Facts, built: str, cuda: str) -> Finding:
    """A card is there and torch is built for CUDA, but does not see it."""
    said = f": {facts.torch.error}" if facts.torch.error else ""
    least = _LEAST_DRIVER.get(int(cuda.partition(".")[0]))
    driver = facts.nvidia_driver
    if driver and least and Version(driver) < Version(least):
        return problem(
            "device",
            f"{built} is built with CUDA {cuda}, which needs driver {least} or newer, and {driver} is loaded{said}",
            f"update the driver, or pip install --force-reinstall torch --index-url {_INDEX}/{_cuda_index(driver)}",
        )
    if not driver:
        return problem("device", f"there is an NVIDIA card and no driver loaded{said}", "modprobe nvidia; nvidia-smi")
    return problem(
        "device",
        f"{built} (CUDA {cuda}) does not see the card, with driver {driver} loaded{said}",
        "nvidia-smi; look at CUDA_VISIBLE_DEVICES, and at the permissions of /dev/nvidia*",
    )


def _cuda_index(driver: str) -> str:
    """The newest of torch's indices a driver can run."""
    if driver and Version(driver) < Version(_LEAST_DRIVER[12]):
        return "cu118"
    if driver and Version(driver) < Version(_LEAST_DRIVER[13]):
        return "cu126"
    return "cu130"


def check_kernels(facts: Facts) -> Iterator[Finding]:
    """Whether torch has kernels for each card."""
    if facts.torch.hip is not None or not facts.torch.archs:
        return
    for device in facts.torch.devices:
        if device.capability is not None and not _has_kernels(facts.torch.archs, device.capability):
            wanted = "sm_{}{}".format(*device.capability)
            version = "'torch<2.15'" if device.capability < (7, 5) else "torch"
            index = "cu126" if device.capability < (7, 5) else "cu130"
            yield problem(
                "device",
                f"{device.name} is {wanted}, and torch {facts.torch.version} has kernels for "
                f"{', '.join(facts.torch.archs)} only",
                f"pip install --force-reinstall {version} --index-url {_INDEX}/{index}",
            )


def _has_kernels(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """sm_XY runs on cards of the same X and Y or more; compute_XY is compiled on any newer one."""
    for arch in archs:
        kind, _, digits = arch.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        built = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and built[0] == capability[0] and built <= capability:
            return True
        if kind == "compute" and built <= capability:
            return True
    return False


def check_dtype(facts: Facts) -> Iterator[Finding]:
    """The type to train in."""
    for device in facts.torch.devices:
        yield _dtype_of(device, facts.torch.hip is not None)
    if not facts.torch.devices and facts.rates is not None:
        rates = facts.rates.flops
        fastest = max(rates, key=lambda name: rates[name])
        speeds = ", ".join(f"{name} {rate / GB:.0f}" for name, rate in rates.items())
        if fastest == "float16" or rates.get("float32", 0) >= rates.get("bfloat16", 0):
            fastest = "float32"
        yield advice("dtype", f"this processor computes, in GFLOP/s: {speeds}", f"set dtype: {fastest}")


def _dtype_of(device: Device, rocm: bool) -> Finding:
    if rocm or device.capability is None or device.capability >= (8, 0):
        return ok("dtype", f"{device.name} computes in bfloat16: dtype: bfloat16")
    capability = "{}.{}".format(*device.capability)
    return advice(
        "dtype",
        f"{device.name} (compute capability {capability}) has no bfloat16 arithmetic, whatever torch says",
        "set dtype: float16",
    )
