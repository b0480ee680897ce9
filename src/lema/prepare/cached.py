"""A model's weights quantised once and kept for the runs that want them so.

It knows settings, sources and a cache; how codes are made `job` knows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from ..config import LemaConfig
from ..errors import ConfigError
from ..storage.cache import cache_folder, digest
from ..storage.index import GlobalBinaryIndex
from .job import VERSION, Progress, prepare
from .locate import locate, open_source
from .quantise import encoder_of
from .source import FileWatch

logger = logging.getLogger(__name__)

_FOLDER = "quantized"


def quantised(config: LemaConfig, progress: Progress | None = None) -> LemaConfig:
    """The settings with the weights they ask for: made of the model's own where that was not done before.

    The model keeps its name, so that the adapter is one of the model and not of this copy.

    Args:
        progress: told of the work, if there is any.

    Raises:
        ConfigError: nothing can be kept, another process is at it, or the model has nothing to quantise.
        UnsupportedError, WeightsError: the weights are codes already, damaged, or find no room; see `prepare`.
    """
    if config.quantize is None:
        return config
    folder = cached_folder(config)
    if not folder.is_dir():
        logger.info("making %s: once, it is kept for later runs", folder)
        source = config.gbi_path or config.model_name_or_path
        prepare(
            source,
            folder,
            quantize=config.quantize,
            config=config.model_name_or_path if config.gbi_path is not None else None,
            progress=progress,
        )
    return config.replace(gbi_path=str(folder), quantize=None)


def cached_folder(config: LemaConfig) -> Path:
    """Where the quantised weights of these settings are, or will be: named by what they are made of.

    Raises:
        ConfigError: no folder to keep them in can be written, or no such format.
        WeightsError: the weights are missing or damaged.
    """
    assert config.quantize is not None
    encoder_of(config.quantize)
    root = cache_folder()
    if root is None:
        raise ConfigError(
            f"quantize={config.quantize!r} keeps its weights in a folder, and none can be written: set LEMA_CACHE to "
            "one, or make them with lema prepare --quantize and give that folder as the model"
        )
    path = locate(str(config.gbi_path or config.model_name_or_path), None, None)
    with closing(open_source(path)) as source:
        made_of = _identity(source.files)
    key = digest(VERSION, config.quantize, made_of)
    return root / _FOLDER / f"{Path(config.model_name_or_path).name}-{config.quantize}-{key}"


def _identity(files: Iterable[Path]) -> str:
    """What the files hold, as far as samples of safetensors say it; of others their names, sizes and times."""
    found: dict[str, object] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with GlobalBinaryIndex(file) as index:
                found.update(index.fingerprint())
        else:
            found[str(file.resolve())] = FileWatch([file]).states[str(file)]
    return json.dumps(found, sort_keys=True)
