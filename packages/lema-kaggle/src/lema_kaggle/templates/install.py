# %% [markdown]
# ## The package
# This notebook carries LEMA inside: the next cell unpacks it and puts it on the path. What it needs and the image
# lacks comes from PyPI, or without the internet from wheels in attached data sets; torch stays as it is.

# %% tags=["archive"]
WHEELS = ""
BENCHMARKS = ""
EXTRAS = ()

# %%
import base64
import importlib
import importlib.metadata
import io
import lzma
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from packaging.requirements import Requirement

unpacked = pathlib.Path(tempfile.mkdtemp(prefix="lema-package-"))
zipfile.ZipFile(io.BytesIO(lzma.decompress(base64.b85decode(WHEELS)))).extractall(unpacked)
pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
own = ["--no-deps", "--no-index", "--no-warn-conflicts", "--target", str(unpacked)]
subprocess.run([*pip, *own, *map(str, unpacked.glob("*.whl"))], check=True)
if BENCHMARKS:
    zipfile.ZipFile(io.BytesIO(lzma.decompress(base64.b85decode(BENCHMARKS)))).extractall(unpacked)
sys.path.insert(0, str(unpacked))
os.environ["PYTHONPATH"] = os.pathsep.join([str(unpacked), *filter(None, [os.environ.get("PYTHONPATH")])])

carried = {one.name: one for one in importlib.metadata.distributions(path=[str(unpacked)])}


def wanted(requirement: Requirement) -> bool:
    """Whether this notebook needs it: always, or for the data set's facts or for plots."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *EXTRAS))


def there(requirement: Requirement) -> bool:
    """Whether it is installed in a version that will do."""
    try:
        return requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


asked = [Requirement(text) for name in ("lema-lora", "lema-lora-reply") for text in carried[name].requires or ()]
needed = [one for one in asked if one.name not in ("trl", *carried) and wanted(one)]
missing = [f"{one.name}{one.specifier}" for one in needed if not there(one)]
if missing:
    kept = unpacked / "constraints.txt"
    kept.write_text(f"torch=={importlib.metadata.version('torch')}\n")
    attached = sorted({str(wheel.parent) for wheel in pathlib.Path("/kaggle/input").rglob("*.whl")})
    links = [word for folder in attached for word in ("--find-links", folder)]
    print("from PyPI or", attached or "nothing attached:", *missing, flush=True)
    if subprocess.run([*pip, "--constraint", str(kept), *links, *missing], check=False).returncode:
        raise SystemExit(
            "These packages are missing here and could not be installed, see above: "
            + " ".join(missing)
            + ". Give the "
            "notebook the internet (build without --no-internet; the account's phone number has to be confirmed), or "
            "attach a data set that has their wheels (--dataset OWNER/SLUG)."
        )
refused = Requirement("torchao>=0.16")  # PEFT fails where an older one is installed; nothing here uses it
try:
    if not refused.specifier.contains(importlib.metadata.version(refused.name), prereleases=True):
        subprocess.run([*pip[:-2], "uninstall", "--yes", "--quiet", refused.name], check=True)
except importlib.metadata.PackageNotFoundError:
    pass
importlib.invalidate_caches()
print(f"lema {carried['lema-lora'].version} in {unpacked}")
