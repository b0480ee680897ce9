"""A GGUF file as a source: dequantised tensor by tensor, with configuration and tokenizer out of the same file.

Which type keeps a file's values is decided here; what GGUF is, `gguf_file` knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ..models.gguf import config_in, tokenizer_in
from ..storage.gguf_header import check_gguf, open_gguf
from ..storage.index import TensorRecord
from ..storage.pieces import PIECE_BYTES
from .gguf_file import GgufTensors


class GgufSource:
    """Parameters of a causal language model in a GGUF file, by transformers' names, float32.

    Args:
        path: the file.
        config: a folder whose config.json says what model it is; None: the file does.

    Raises:
        WeightsNotFoundError, WeightsFormatError: no such file, no GGUF file, or a damaged one.
        UnsupportedError: an architecture or a type that cannot be read.
        MissingTensorError: the file lacks tensors of the model.
    """

    def __init__(self, path: Path, config: Path | None = None) -> None:
        check_gguf(path)
        self.path, self.files = path, [path]
        self.metadata: dict[str, str] = {}
        reader = open_gguf(path)
        self.config: PretrainedConfig = (
            AutoConfig.from_pretrained(config, trust_remote_code=False) if config else config_in(path)
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        model.tie_weights()
        self.config.architectures = [type(model).__name__]
        self._gguf = GgufTensors(path, reader, model)
        self.tensors = {
            name: TensorRecord(name, path, 0, 4 * math.prod(shape), torch.float32, shape)
            for name, shape in self._gguf.shapes.items()
        }

    def config_values(self) -> dict[str, Any]:
        """config.json as transformers would write it."""
        values: dict[str, Any] = json.loads(self.config.to_json_string(use_diff=True))
        return {name: value for name, value in values.items() if name != "_name_or_path"}

    @property
    def natural_dtype(self) -> torch.dtype:
        """The smallest type that keeps the file's precision: its own, and float16 for what is quantised to 8 bits or
        less, whose scales are float16."""
        types = self._gguf.types
        if not types <= {"F32", "F16", "BF16"}:
            return torch.float16
        halves = types - {"F32"}
        one = halves.pop() if len(halves) == 1 else ""  # no 16-bit type holds both
        return {"F16": torch.float16, "BF16": torch.bfloat16}.get(one, torch.float32)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The dequantised tensor, whole in memory while its pieces are taken."""
        return iter(self._gguf.read(name).reshape(-1).split(PIECE_BYTES // 4))

    def save_tokenizer(self, folder: Path) -> None:
        """Write the file's tokenizer and chat template as transformers does.

        Raises:
            WeightsFormatError: the file has no tokenizer that transformers can read.
        """
        tokenizer_in(self.path).save_pretrained(folder)

    def close(self) -> None:
        """Nothing is held open."""
