"""`Speaker`: a model with its tokenizer and chat template, which answers.

It knows where a run, an adapter or a model keeps these; how layers come into memory is the model's business.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import TextStreamer

from ..config import CONFIG_NAME, LemaConfig
from ..core.lora import ADAPTER_CONFIG, LoRAManager
from ..data.render import ChatRenderer
from ..engine.training import load_tokenizer
from ..errors import ConfigError, InputError
from ..model import LemaModel
from .sampling import Sampling

_TOKENIZER = "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer."""

    text: str
    """Without special tokens, and without the stop text that ended it."""
    num_tokens: int
    seconds: float
    ended_by: str
    """'end' (the model's own end token), 'stop' (a stop text) or 'length'."""
    raw: str = ""
    """As the model wrote it, special tokens and stop text included."""


class Speaker:
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
        **overrides: Any,
    ) -> Speaker:  # fmt: skip
        """From a checkpoint of a run, an adapter of PEFT, a merged model, or any model.

        Args:
            base: the model an adapter is for, where it is not where the adapter says.
            adapter: False: the base model alone.
            template: a Jinja file; None: the tokenizer's own.
            **overrides: settings of `LemaConfig`.

        Raises:
            ConfigError: there is no tokenizer, or nothing says which model the adapter is for.
            WeightsNotFoundError: there is nothing at the path.
        """
        folder = Path(path)
        config = _config_of(folder, str(path), base, overrides)
        if not adapter:
            config = config.replace(use_lora=False)
        tokenizer = load_tokenizer(folder if (folder / _TOKENIZER).is_file() else config.model_name_or_path)
        renderer = ChatRenderer.from_file(tokenizer, template)
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
        ids = self.renderer.plain(prompt) if plain else self.renderer.ask(prompt)
        return self.continue_from(ids, sampling, tell)

    def continue_from(
        self, ids: Sequence[int], sampling: Sampling, tell: Callable[[str], None] | None = None
    ) -> Reply:  # fmt: skip
        """The model's continuation of token ids.

        Raises:
            InputError: no tokens, or more than the model takes.
        """
        if not ids:
            raise InputError("the prompt is empty: there is nothing to answer")
        room = self.context - len(ids) if self.context is not None else sampling.max_new_tokens
        if room < 1:
            raise InputError(f"the prompt has {len(ids)} tokens, and the model takes {self.context}: shorten it")
        started = time.perf_counter()
        settings = {**sampling.settings(), "max_new_tokens": min(sampling.max_new_tokens, room)}
        stops = {"stop_strings": list(sampling.stop), "tokenizer": self.tokenizer} if sampling.stop else {}
        streamer = _Teller(self.tokenizer, tell, sampling.stop) if tell is not None else None
        made = self.model.generate(
            torch.tensor([list(ids)]), streamer=streamer, pad_token_id=self._padding(),
            eos_token_id=sorted(self._end_tokens()), **settings, **stops,
        )  # fmt: skip
        new = made[0, len(ids) :].tolist()
        raw = self.tokenizer.decode(new)
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        found = [text.index(stop) for stop in sampling.stop if stop in text]
        ends = self._end_tokens()
        by_end = bool(new) and new[-1] in ends
        ended_by = "stop" if found else "end" if by_end else "length"
        return Reply(text[: min(found)] if found else text, len(new), time.perf_counter() - started, ended_by, raw)

    def close(self) -> None:
        """Give the model back."""
        self.model.close()

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_tokens(self) -> set[int]:
        module: Any = self.model.adapter.causal_lm().module
        ends = module.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [ends]
        return {token for token in (*listed, *self.renderer.end_tokens) if token is not None}

    def _padding(self) -> int:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(pad if pad is not None else end if end is not None else 0)


def _config_of(folder: Path, given: str, base: str | None, overrides: dict[str, Any]) -> LemaConfig:
    """Settings for what lies in a folder."""
    if (folder / CONFIG_NAME).is_file():
        config = LemaConfig.from_pretrained(folder)
        named = {"model_name_or_path": base, "gbi_path": None} if base is not None else {}
        # budgets and decisions were for training steps
        planned = dict.fromkeys(
            ("ram_budget", "vram_budget", "ram_layers", "device_layers", "keep_activations", "head", "boundaries",
             "optimizer_place", "micro_batch_size")
        )  # fmt: skip
        return config.replace(**planned, **named).replace(**overrides)
    if not (folder / ADAPTER_CONFIG).is_file():
        if base is not None:
            raise ConfigError(f"{given} holds no adapter ({ADAPTER_CONFIG} is missing), so there is no use for a base")
        return LemaConfig(given, use_lora=False, **overrides)
    try:
        values = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{folder / ADAPTER_CONFIG} is not valid JSON: {error}") from error
    name = base or values.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{folder / ADAPTER_CONFIG} does not say which model it is for: name it with --base")
    return LemaConfig(
        name, lora_rank=values["r"], lora_alpha=values["lora_alpha"], lora_target_modules=values["target_modules"],
        **overrides,
    )  # fmt: skip


class _Teller(TextStreamer):
    """Passes text on as it becomes certain, but for what may yet turn out to be the start of a stop text."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None], stop: tuple[str, ...]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell
        self._stop = stop
        self._held = ""
        self._stopped = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece of text."""
        if self._stopped:
            return
        self._held += text
        found = [self._held.index(stop) for stop in self._stop if stop in self._held]
        if found:
            self._stopped = True
            certain = min(found)
        else:
            certain = len(self._held) if stream_end else len(self._held) - self._may_begin_a_stop()
        if certain:
            self._tell(self._held[:certain])
        self._held = self._held[certain:]

    def _may_begin_a_stop(self) -> int:
        """Characters at the end that are the beginning of a stop text."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
