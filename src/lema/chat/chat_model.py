"""`ChatModel`: a model with its tokenizer and chat template, which answers.

Where a run, an adapter or a model keeps these is found out here; how layers come into memory is the model's business.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..config import CONFIG_NAME, LemaConfig
from ..data.render import ChatRenderer
from ..engine.generation import end_tokens
from ..errors import ConfigError, InputError, WeightsNotFoundError
from ..json_file import read_object
from ..machine.choices import DTYPES
from ..models.locate import adapter_path
from ..models.lora import ADAPTER_CONFIG, LoRAManager
from ..run.facade import LemaModel
from ..run.training import limits_of, load_tokenizer
from ..typed import PLANNED, fields_with
from .answer import Reply, TextStreamer, reply_of
from .sampling import Sampling

_MODEL, _TOKENIZER = "config.json", "tokenizer_config.json"


class ChatModel:
    """Answers prompts.

    Args:
        model: with or without an adapter.
        renderer: the tokenizer and its chat template.
    """

    def __init__(self, model: LemaModel, renderer: ChatRenderer) -> None:
        self.model = model
        self.renderer = renderer
        self.tokenizer = renderer.tokenizer

    @classmethod
    def open(
        cls, path: str | Path, *, base: str | None = None, adapter: bool = True, template: str | None = None,
        variables: Mapping[str, Any] | None = None, **overrides: Any,
    ) -> ChatModel:  # fmt: skip
        """From a checkpoint of a run, an adapter of PEFT, a merged model, or any model.

        Args:
            base: the model an adapter is for, where it is not where the adapter says.
            adapter: False: the base model alone.
            template: a Jinja file; None: the tokenizer's own.
            variables: of the template; None: those it was trained with.
            **overrides: settings of `LemaConfig`.

        Raises:
            ConfigError: there is no tokenizer, or nothing says which model the adapter is for.
            WeightsNotFoundError: there is nothing at the path.
        """
        folder = _folder_of(path)
        config = _config_of(folder, str(path), base, overrides)
        if not adapter:
            config = config.replace(use_lora=False)
        tokenizer = load_tokenizer(folder if (folder / _TOKENIZER).is_file() else config.model_name_or_path)
        renderer = ChatRenderer.from_file(tokenizer, template, variables)
        model = LemaModel(config)
        if model.lora_manager is not None and not (folder / CONFIG_NAME).is_file():  # patterns, rsLoRA
            model.lora_manager = LoRAManager(LoRAManager.settings_from(folder), device=config.device, seed=config.seed)
        if model.lora_manager is not None:
            model.initialize_lora()
            model.lora_manager.load_pretrained(folder)
        return cls(model, renderer)

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer that the model takes; None where it has no limit of its own."""
        return self.model.adapter.causal_lm().max_positions

    def reply(
        self, prompt: str, sampling: Sampling, tell: Callable[[str], None] | None = None, *, plain: bool = False
    ) -> Reply:
        """Answer one prompt.

        Args:
            prompt: a user's message; written into the chat template where the tokenizer has one.
            tell: told each piece of the answer as it comes, special tokens and stop texts left out.
            plain: take the prompt as it is, without template.
        """
        return self.continue_from(self._ids(prompt, plain), sampling, tell)

    def replies(
        self, prompts: Sequence[str], sampling: Sampling, *, batch_size: int = 16, plain: bool = False,
        tell: Callable[[int], None] | None = None,
    ) -> list[Reply]:  # fmt: skip
        """Answer many prompts, `batch_size` at once; greedy answers are those of `reply`.

        Args:
            tell: told how many more are answered, batch after batch.
            plain: take the prompts as they are, without template.

        Raises:
            InputError: a prompt that cannot be answered; says which, and nothing is begun.
        """
        return self.continue_all([self._ids(prompt, plain) for prompt in prompts], sampling, batch_size, tell)

    def continue_from(
        self, ids: Sequence[int], sampling: Sampling, tell: Callable[[str], None] | None = None
    ) -> Reply:  # fmt: skip
        """The model's continuation of token ids.

        Raises:
            InputError: no tokens, or more than the model takes.
        """
        self._room(ids, sampling)
        streamer = None if tell is None else TextStreamer(self.tokenizer, tell, sampling)
        return self._continue([ids], sampling, streamer)[0]

    def continue_all(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int = 16,
        tell: Callable[[int], None] | None = None,
    ) -> list[Reply]:  # fmt: skip
        """As `replies`, for prompts that are token ids. Prompts of like length share a batch, padded on the left."""
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be 1 or more")
        rooms = []
        for number, ids in enumerate(prompts, 1):
            try:
                rooms.append(self._room(ids, sampling))
            except InputError as error:
                raise InputError(f"prompt {number}: {error}") from error
        longest_first = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        found: dict[int, Reply] = {}
        # beside a longer prompt, one that the window cuts short would be cut shorter
        for _, alike in groupby(longest_first, key=rooms.__getitem__):
            group = list(alike)
            for start in range(0, len(group), batch_size):
                together = group[start : start + batch_size]
                found.update(zip(together, self._continue([prompts[i] for i in together], sampling), strict=True))
                if tell is not None:
                    tell(len(together))
        return [found[i] for i in range(len(prompts))]

    def close(self) -> None:
        """Give the model back."""
        self.model.close()

    def __enter__(self) -> ChatModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ids(self, prompt: str, plain: bool) -> list[int]:
        return self.renderer.plain(prompt) if plain else self.renderer.ask(prompt)

    def _room(self, ids: Sequence[int], sampling: Sampling) -> int:
        """Tokens that an answer to a prompt may have."""
        if not ids:
            raise InputError("the prompt is empty: there is nothing to answer")
        room = self.context - len(ids) if self.context is not None else sampling.max_new_tokens
        if room < 1:
            raise InputError(f"the prompt has {len(ids)} tokens, and the model takes {self.context}: shorten it")
        return min(room, sampling.max_new_tokens)

    def _continue(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, streamer: TextStreamer | None = None
    ) -> list[Reply]:
        """Continuations of prompts in one batch; there is room for all of them."""
        started = time.perf_counter()
        longest, pad = max(map(len, prompts)), self._padding()
        inputs = {
            "input_ids": torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompts]),
            "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
        }
        ends = self._end_tokens()
        stops = {"stop_strings": list(sampling.stop), "tokenizer": self.tokenizer} if sampling.stop else {}
        settings = {**sampling.settings(), "max_new_tokens": min(self._room(ids, sampling) for ids in prompts)}
        made = self.model.generate(
            inputs, streamer=streamer, pad_token_id=pad, eos_token_id=sorted(ends), **settings, **stops
        )
        seconds = time.perf_counter() - started
        return [reply_of(row, self.tokenizer, ends, sampling, seconds) for row in made[:, longest:].tolist()]

    def _end_tokens(self) -> set[int]:
        self.model.initialize_lora()
        return end_tokens(self.model.adapter.causal_lm().module) | {*self.renderer.end_tokens}

    def _padding(self) -> int:
        limits = limits_of(self.model.adapter.causal_lm())
        return limits.padding((self.tokenizer.pad_token_id, self.tokenizer.eos_token_id))


def _folder_of(path: str | Path) -> Path:
    """Where an adapter of the hub has come to; anything else stays as it is given."""
    folder = Path(path)
    if not folder.exists():
        with contextlib.suppress(WeightsNotFoundError):
            fetched = adapter_path(str(path))
            return fetched if (fetched / ADAPTER_CONFIG).is_file() else folder
    return folder


def _config_of(folder: Path, given: str, base: str | None, overrides: dict[str, Any]) -> LemaConfig:
    """Settings for what lies in a folder."""
    if (folder / CONFIG_NAME).is_file():
        config = LemaConfig.from_pretrained(folder)
        if config.adapter_name_or_path is not None:  # where it began; what it came to is here
            config = config.replace(adapter_name_or_path=str(folder))
        named = {"model_name_or_path": base, "gbi_path": None} if base is not None else {}
        # budgets and decisions were for training steps
        planned = dict.fromkeys((*fields_with(LemaConfig, PLANNED), "micro_batch_size"))
        return config.replace(gradient_accumulation_steps=1, **planned, **named).replace(**overrides)
    if not (folder / ADAPTER_CONFIG).is_file():
        if base is not None:
            raise ConfigError(f"{given} holds no adapter ({ADAPTER_CONFIG} is missing), so there is no use for a base")
        return LemaConfig(given, use_lora=False, **{**_own_dtype(given), **overrides})
    settings = LoRAManager.settings_from(folder)
    name = base or read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{folder / ADAPTER_CONFIG} does not say which model it is for: name it with --base")
    own = {"rank": settings["r"], "alpha": settings["lora_alpha"], "target_modules": settings["target_modules"]}
    return LemaConfig(name, **{**{f"lora_{k}": v for k, v in own.items()}, **_own_dtype(name), **overrides})


def _own_dtype(name: str) -> dict[str, str]:
    """The type a model says its weights have, where it says one that can be computed in."""
    path = Path(name) / _MODEL
    if not path.is_file():  # of the hub, or without one: whoever loads it will say
        return {}
    values, _ = PreTrainedConfig.get_config_dict(path.parent)
    own = str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")
    return {"dtype": own} if own in DTYPES else {}
