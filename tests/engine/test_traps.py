"""Every trap of the design: what its guard gives, and what would happen without it.

Where it can be done, the guard is taken away inside the test, which then must see wrong numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache

import lema
from families import save_tiny
from helpers import (
    Pair,
    Recorder,
    adapter_of,
    cut_into,
    differing,
    errors,
    gradients_of,
    lema_config,
    lema_model,
    lema_step,
    padded_batch,
    plain_model,
    plain_step,
    randomise,
    recorded,
    recording_trainer,
    relative,
    strategy_plan,
)
from lema.engine.loss.positions import compute_loss
from lema.errors import (
    BindingError,
    ConfigError,
    ReadError,
    UnsupportedError,
)
from lema.models import get_adapter
from lema.models.lora import LoRAManager
from lema.models.skeleton import build_skeleton
from lema.storage.index import GlobalBinaryIndex
from lema.storage.reader import ReadJob
from lema.storage.views import page_aligned, typed_view
from lema.streaming import layer_call as streamed_layer
from lema.streaming.arguments import BatchRules, check_replayable
from lema.streaming.weight_store import WeightStore

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture
def pair(llama: Path) -> Iterator[Pair]:
    pair = Pair.of(llama)
    yield pair
    pair.close()


# -- units and the rest (D1) -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox", "phi", "falcon"])
def test_buffers_of_the_skeleton_are_real_and_right(tmp_path: Path, family: str) -> None:
    plain = save_tiny(family, tmp_path)
    skeleton = build_skeleton(plain.config, torch.float32, "eager")
    expected = dict(plain.named_buffers())
    found = dict(skeleton.named_buffers())
    assert expected.keys() == found.keys()
    assert all(found[n].device.type == "cpu" and torch.equal(found[n], b) for n, b in expected.items())
    assert not any(p.is_meta for p in skeleton.parameters())


def test_initial_adapters_are_pefts(llama: Path) -> None:
    plain = plain_model(llama)
    with lema_model(llama) as model:
        assert not differing(dict(adapter_of(plain)), dict(adapter_of(model.hf_model)))
    assert all(bool(p.any()) for n, p in adapter_of(plain).items() if "lora_A" in n)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "eva", "lora_ga", "orthogonal"])
def test_starts_from_the_base_weights_are_refused_by_name(start: str) -> None:
    with pytest.raises(UnsupportedError, match=start):
        LoRAManager({"init_lora_weights": start}, device="cpu")


@pytest.mark.parametrize(
    ("setting", "value", "name"),
    [
        ("use_dora", True, "DoRA"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("loftq_config", {"loftq_bits": 4}, "LoftQ"),
        ("trainable_token_indices", [1], "trainable tokens"),
        ("target_parameters", ["mlp.experts.gate_up_proj"], "target_parameters"),
    ],
)
def test_adapters_that_would_be_wrong_are_refused_by_name(setting: str, value: Any, name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        LoRAManager({setting: value}, device="cpu")


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama", "lm_head"),
        ("llama", "embed_tokens"),
        ("gpt2", "wte"),
        ("gpt2", "wpe"),
        ("gpt_neox", "embed_out|lm_head"),
    ],
)
def test_lora_on_head_or_embeddings_is_refused_by_name(tmp_path: Path, family: str, target: str) -> None:
    save_tiny(family, tmp_path)
    with pytest.raises((UnsupportedError, ConfigError), match=target):
        lema_model(tmp_path, lora_target_modules=[*_some(family), *target.split("|")])


def _some(family: str) -> list[str]:
    return {"llama": ["q_proj"], "gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]}[family]


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux's /proc")
def test_the_embedding_is_mapped_for_random_reads(llama: Path) -> None:
    """Without the advice a few rows pull in their whole neighbourhood, and in time the whole table."""
    with lema_model(llama) as model:
        table = model.adapter.causal_lm().module.get_input_embeddings().weight
        assert "rr" in _mapping_flags(table.data_ptr())
        heap = torch.zeros(1 << 20)
        assert "rr" not in _mapping_flags(heap.data_ptr())


def _mapping_flags(address: int) -> list[str]:
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no mapping holds this address")


# -- files (D2) ------------------------------------------------------------------------------------


def test_gpt_neox_head_is_found_under_its_old_name(tmp_path: Path) -> None:
    save_tiny("gpt_neox", tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "embed_out.weight" in names, "transformers writes another name now: make the file by hand"
    pair = Pair.of(tmp_path)
    assert not differing(plain_step(pair.plain, padded_batch())[1], lema_step(pair.model, padded_batch())[1])
    pair.close()


def test_gpt2_files_of_the_hub_lack_the_prefix_and_carry_masks(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path)
    path = tmp_path / "model.safetensors"
    stored = {name.removeprefix("transformer."): t for name, t in load_file(path).items() if name != "lm_head.weight"}
    for i in range(4):
        stored[f"h.{i}.attn.bias"] = torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64)
        stored[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    assert not any(name.startswith("transformer.") for name in stored)
    save_file(stored, path, metadata={"format": "pt"})
    pair = Pair.of(tmp_path)
    expected_loss, expected = plain_step(pair.plain, padded_batch())
    loss, found = lema_step(pair.model, padded_batch())
    assert relative(loss, expected_loss) <= 1e-6
    assert not differing(expected, found)
    pair.close()


# -- autograd's eyes and bindings (D3) -------------------------------------------------------------


def _first_linear(manager: WeightStore, unit: int) -> torch.Tensor:
    return next(t for t in manager._layers[unit].in_slot if t.dim() == 2)


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_a_saved_weight_overwritten_by_a_load_raises_at_backward(
    llama: Path, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lema_model(llama, prefetch_depth=0)
    manager = model.memory
    if not guarded:
        monkeypatch.setattr(manager._tier.cache, "on_overwrite", lambda load: None)
    inputs = torch.randn(3, 32, requires_grad=True)
    with manager.use(0):
        weight = _first_linear(manager, 0)
        copy = weight.detach().clone()
        output = nn.functional.linear(inputs, weight)
    with manager.use(2):  # lives in the same slot
        pass
    right = copy.sum(0).expand(3, -1)
    if guarded:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
    else:
        output.sum().backward()
        assert inputs.grad is not None
        assert not torch.allclose(inputs.grad, right), "without the guard the gradient is wrong and nobody says so"
    model.close()


def test_a_saved_weight_nobody_overwrote_gives_its_gradient(pair: Pair) -> None:
    manager = pair.model.memory
    inputs = torch.randn(3, 32, requires_grad=True)
    with manager.use(0):
        weight = _first_linear(manager, 0)
        nn.functional.linear(inputs, weight).sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, weight.sum(0).expand(3, -1))


def test_each_bound_parameter_has_a_version_counter_of_its_own(pair: Pair) -> None:
    manager = pair.model.memory
    for bound in manager._layers:
        first, *others = bound.in_slot
        before = [t._version for t in others]
        torch.autograd.graph.increment_version(first)
        assert [t._version for t in others] == before
    sliced = torch.zeros(64, dtype=torch.uint8)
    a, b = sliced[:32].view(torch.float32), sliced[32:].view(torch.float32)
    torch.autograd.graph.increment_version(a)
    assert b._version == 1, "slices share a counter: this is what typed_view is there for"
    c, d = (typed_view(page_aligned(64), i, torch.float32, (4,)) for i in (0, 16))
    before_d = d._version
    torch.autograd.graph.increment_version(c)
    assert d._version == before_d


@pytest.mark.parametrize(
    "deed",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.to("meta"),
        lambda m: m.get_base_model().half(),
        lambda m: m.get_base_model().model.layers[1].half(),
        lambda m: m.get_base_model().model.layers[1].mlp.to(torch.float64),
        lambda m: m.merge_adapter(),
        lambda m: m.merge_and_unload(),
        lambda m: m.get_base_model().save_pretrained("never"),
    ],
    ids=[
        "half", "to bfloat16", "double", "to meta", "base half", "layer half", "mlp to float64", "merge_adapter",
        "merge_and_unload", "base save_pretrained",
    ],
)  # fmt: skip
def test_what_would_break_the_binding_is_refused_and_breaks_nothing(pair: Pair, deed: Any) -> None:
    expected_loss, expected = plain_step(pair.plain, padded_batch())
    with pytest.raises(BindingError):
        deed(pair.model.hf_model)
    loss, found = lema_step(pair.model, padded_batch())
    assert relative(loss, expected_loss) <= 1e-6
    assert not differing(expected, found)


def test_casts_that_change_nothing_are_let_through(pair: Pair) -> None:
    model = pair.model.hf_model
    assert model.float() is model
    assert model.to("cpu") is model
    assert not differing(plain_step(pair.plain, padded_batch())[1], lema_step(pair.model, padded_batch())[1])


def test_pefts_save_pretrained_saves_the_adapter(pair: Pair, tmp_path: Path) -> None:
    pair.model.hf_model.save_pretrained(str(tmp_path / "streamed"))
    pair.plain.save_pretrained(str(tmp_path / "plain"))
    found = load_file(tmp_path / "streamed" / "adapter_model.safetensors")
    expected = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert not differing(expected, found)
    assert expected.keys() == found.keys()
    keys = ("r", "lora_alpha", "peft_type", "task_type", "base_model_name_or_path")
    read = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("streamed", "plain")]
    assert [read[0][k] for k in keys] == [read[1][k] for k in keys]


def test_a_moved_parameter_is_found_at_the_next_step(pair: Pair) -> None:
    layer = pair.model.adapter.causal_lm().layers[1]
    norm = layer.input_layernorm
    norm._parameters["weight"] = nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
    with pytest.raises(BindingError, match="layer 1"):
        lema_step(pair.model, padded_batch())


def test_a_parameter_moved_through_data_is_found_too(pair: Pair) -> None:
    weight = pair.model.adapter.causal_lm().layers[2].mlp.up_proj.base_layer.weight
    weight.data = weight.data.clone()
    with pytest.raises(BindingError, match="layer 2"):
        pair.model.hf_model(input_ids=padded_batch()["input_ids"])


# -- the wrapped layer (D8) ------------------------------------------------------------------------


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_autocast_is_restored_in_the_backward(pair: Pair, guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not guarded:
        monkeypatch.setattr(streamed_layer.Autocast, "restored", lambda self: contextlib.nullcontext())
    both = []
    for model in (pair.plain, pair.model.hf_model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**padded_batch(), use_cache=False).loss
        loss.backward()
        both.append((loss.detach(), gradients_of(model)))
    (expected_loss, expected), (loss, found) = both
    assert torch.equal(expected_loss, loss), "the loss never tells"
    assert bool(differing(expected, found)) is not guarded


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("micro", [None, 1], ids=["whole", "micro-batches"])
def test_random_state_is_replayed(
    llama: Path, micro: int | None, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at a time has another order of draws than plain PEFT, so compare a step with finite differences."""
    if not guarded:
        monkeypatch.setattr(streamed_layer.LayerCall, "replaying", lambda self, number: torch.enable_grad())
    with lema_model(llama, lora_dropout=0.5, micro_batch_size=micro) as model:
        randomise(model.hf_model)
        trainer = recording_trainer(model)
        batch = padded_batch()
        torch.manual_seed(3)
        _, gradients = lema_step(model, batch, trainer)
        after = torch.get_rng_state()
        name, parameter = next(
            (n, p) for n, p in adapter_of(model.hf_model).items() if "layers.1.mlp.down_proj.lora_B" in n
        )
        direction = gradients[name] / gradients[name].norm()
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
            torch.manual_seed(3)
            losses.append(lema_step(model, batch, trainer)[0])
            with torch.no_grad():
                parameter.add_(direction, alpha=-step)
        slope = (losses[0] - losses[1]) / 2e-2
        if guarded:
            assert torch.equal(after, torch.get_rng_state()), "replaying must put the random state back"
        assert (abs(slope / gradients[name].norm().item() - 1) < 0.02) is guarded


def test_the_random_state_after_a_step_is_plain_pefts(llama: Path) -> None:
    pair = Pair.of(llama, lora_dropout=0.5)
    torch.manual_seed(3)
    plain_step(pair.plain, padded_batch())
    expected = torch.rand(4)
    torch.manual_seed(3)
    lema_step(pair.model, padded_batch())
    assert torch.equal(torch.rand(4), expected)
    pair.close()


def test_a_cache_is_refused_while_gradients_are_on(pair: Pair) -> None:
    model = pair.model.hf_model
    ids = padded_batch()["input_ids"]
    with pytest.raises(UnsupportedError, match="cache"):
        model(input_ids=ids, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(UnsupportedError, match="cache"):
        model(input_ids=ids, use_cache=True)
    with torch.no_grad():
        assert model(input_ids=ids, use_cache=True).past_key_values is not None


@pytest.mark.parametrize("in_config", [True, False])
def test_use_cache_is_forced_off_under_gradients(pair: Pair, in_config: bool) -> None:
    pair.model.adapter.causal_lm().module.config.use_cache = in_config
    output = pair.model.hf_model(**padded_batch())
    assert output.past_key_values is None
    output.loss.backward()
    assert not differing(plain_step(pair.plain, padded_batch())[1], gradients_of(pair.model.hf_model))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"states": set()}, "states, a set"),
        ({"positions": (torch.zeros(1), {"of": object()})}, r"positions\[1\]\['of'\], a object"),
        ({"past_key_values": DynamicCache()}, "past_key_values"),
        ({"caches": [DynamicCache()]}, r"caches\[0\]"),
    ],
)
def test_arguments_a_replay_would_not_see_again_are_refused_by_name(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        check_replayable("layer 3 (Made)", (), arguments)
    check_replayable("layer 3", (torch.zeros(2), None), {"a": (torch.zeros(1), 2.0), "b": "eager", "c": torch.float32})
    check_replayable("layer 3", ([torch.zeros(2, requires_grad=True)],), {"shared": {"keys": (torch.zeros(1),)}})


def test_a_layer_called_with_an_object_it_could_write_to_is_refused_in_place(pair: Pair) -> None:
    layer = pair.model.adapter.causal_lm().layers[0]
    hidden = torch.zeros(1, 2, 32, requires_grad=True)
    with pytest.raises(UnsupportedError, match=r"layer 0 .*shared"):
        layer(hidden, shared=set())


def test_needs_input_grad_is_honoured(pair: Pair) -> None:
    """Frozen adapters get no gradient, and with every adapter of the lower layers frozen none is computed below."""
    own = adapter_of(pair.model.hf_model)
    for model in (pair.plain, pair.model.hf_model):
        for name, parameter in adapter_of(model).items():
            parameter.requires_grad_(("layers.2" in name and "lora_B" in name) or "layers.3.self_attn.q_proj" in name)
    visits: list[tuple[int, str]] = []
    memory: Any = pair.model.memory
    acquire = memory.acquire
    memory.acquire = lambda unit, phase: (visits.append((unit, phase.value)), acquire(unit, phase))[1]
    _, expected = plain_step(pair.plain, padded_batch())
    loss = pair.model.hf_model(**padded_batch()).loss
    loss.backward()
    assert [u for u, phase in visits if phase == "backward" and u < memory.num_units] == [3, 2]
    found = gradients_of(pair.model.hf_model)
    assert found.keys() == expected.keys() == {n for n, p in own.items() if p.requires_grad}
    assert not differing(expected, found)


def test_a_gradient_of_the_inputs_alone(pair: Pair) -> None:
    """All adapters frozen, and a gradient asked of the embedded inputs."""
    ids = padded_batch()["input_ids"]
    found = []
    for model in (pair.plain, pair.model.hf_model):
        for parameter in adapter_of(model).values():
            parameter.requires_grad_(False)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model(inputs_embeds=embedded, use_cache=False).logits.square().mean().backward()
        found.append(embedded.grad)
    assert torch.equal(found[0], found[1])


def test_gradient_checkpointing_enable_does_nothing(pair: Pair) -> None:
    model = pair.model.hf_model
    model.gradient_checkpointing_enable()
    pair.model.adapter.causal_lm().module.gradient_checkpointing_enable({"use_reentrant": False})
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in model.modules())
    calls = 0
    layer = pair.model.attachment.layers[1]
    run = type(layer).run

    def counted(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += self is layer
        return run(self, *args)

    type(layer).run = counted  # type: ignore[method-assign]
    try:
        _, found = lema_step(pair.model, padded_batch())
    finally:
        type(layer).run = run  # type: ignore[method-assign]
    assert calls == 2, "once forward, once in the backward"
    assert not differing(plain_step(pair.plain, padded_batch())[1], found)


@pytest.mark.parametrize(("family", "name"), [("llama", "output_attentions"), ("mixtral", "output_router_logits")])
def test_outputs_that_would_be_wrong_are_refused(tmp_path: Path, family: str, name: str) -> None:
    save_tiny(family, tmp_path)
    with lema_model(tmp_path, lora_target_modules=["q_proj"]) as model:
        ids = padded_batch()["input_ids"]
        with pytest.raises(UnsupportedError, match=name):
            model.hf_model(input_ids=ids, **{name: True})
        setattr(model.adapter.causal_lm().module.config, name, True)
        with pytest.raises(UnsupportedError, match=name):
            model.hf_model(input_ids=ids)


# -- the batch inside the layer (D9) ---------------------------------------------------------------


def test_a_head_count_that_equals_the_batch_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Falcon's layers get an alibi tensor with a dimension of heads beside one of rows; here both are 4."""
    save_tiny("falcon", tmp_path, alibi=True, new_decoder_architecture=False, multi_query=True)
    pair = Pair.of(tmp_path)
    batch = padded_batch(4, 10)
    _, expected = plain_step(pair.plain, batch)
    assert not differing(expected, lema_step(pair.model, batch)[1])
    attachment = pair.model.attachment
    attachment.batching.micro_batch_size = 1
    _, found = lema_step(pair.model, batch)
    assert max(errors(expected, found).values()) < 1e-4
    pair.close()


def test_rules_know_dimensions_by_name_not_by_size() -> None:
    rules = BatchRules()
    rules._add(("mask", 4), (2, 1, 5, 5), (3, 1, 5, 5))
    rules._add(("slopes", 2), (4, 8), (4, 8))
    rules._add(("late", 2), (5, 2), (5, 3))
    arguments = (
        (),
        {"mask": torch.arange(4 * 9).view(4, 1, 3, 3), "slopes": torch.ones(4, 8), "late": torch.ones(5, 4)},
    )
    _, cut = rules.rows(arguments, 4, 1, 2)
    assert cut["mask"].flatten().tolist() == list(range(9, 18))
    assert cut["slopes"].shape == (4, 8), "as many heads as rows, and still not cut"
    assert cut["late"].shape == (5, 1)


def test_rules_refuse_what_moves_unexpectedly() -> None:
    with pytest.raises(UnsupportedError, match="folded"):
        BatchRules()._add(("folded", 2), (8, 5), (12, 5))
    with pytest.raises(UnsupportedError, match="both"):
        BatchRules()._add(("both", 2), (2, 2), (3, 3))
    rules = BatchRules()
    rules._add(("mask", 2), (2, 5), (3, 5))
    with pytest.raises(UnsupportedError, match="unknown"):
        rules.rows(((), {"unknown": torch.ones(4, 4)}), 4, 0, 1)
    with pytest.raises(UnsupportedError, match="mask"):
        rules.rows(((), {"mask": torch.ones(3, 5)}), 4, 0, 1)


# -- the loss (D10) --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_the_head_is_more_than_a_product(tmp_path: Path, family: str) -> None:
    """Soft caps and scales are done by the model's own code; `hidden @ W.T` would be another loss."""
    save_tiny(family, tmp_path)
    pair = Pair.of(tmp_path)
    batch = padded_batch()
    lm = pair.model.adapter.causal_lm()
    with torch.no_grad():
        hidden = lm.hidden_states(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        product = hidden @ lm.module.get_output_embeddings().weight.T
        assert not torch.allclose(lm.logits(hidden), product, rtol=1e-2)
    expected_loss, expected = plain_step(pair.plain, batch)
    for chunk in (None, 1, 5):
        with cut_into(pair.model, chunk=chunk):
            loss, found = lema_step(pair.model, batch)
        assert relative(loss, expected_loss) <= 1e-6
        assert max(errors(expected, found).values()) < (1e-5 if chunk else 1e-12)
    pair.close()


def test_the_loss_scale_is_applied_before_the_gradient_is_formed(pair: Pair) -> None:
    """fp16 gradients of a mean over many targets underflow; scaled afterwards they stay lost."""
    lm = pair.model.adapter.causal_lm()
    lm.module.lm_head.half()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 64, 32, generator=generator).half()
    targets = torch.randint(0, 99, (4, 64), generator=generator)
    denominator = 65536.0
    exact = compute_loss(_double_head(lm), hidden.double(), targets, denominator).gradient
    assert exact is not None

    def error(**how: Any) -> float:
        scale = how.get("scale", 1.0)
        gradient = compute_loss(lm, hidden, targets, denominator, **how).gradient
        assert gradient is not None
        return float((gradient.double() / scale - exact).norm() / exact.norm())

    scaled, unscaled, chunked = error(scale=65536.0), error(), error(scale=65536.0, chunk_size=50)
    assert scaled < 0.01
    assert chunked < 0.01
    assert unscaled > 10 * scaled


def _double_head(lm: Any) -> Any:
    weight = lm.module.lm_head.weight.double()
    return types.SimpleNamespace(
        logits=lambda hidden: hidden @ weight.T,
        loss=lambda logits, targets, n: (
            nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / n
        ),
    )


# -- stale data (section 4) ------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", [False, True], ids=["all loads", "one load skipped"])
def test_poison_makes_a_skipped_load_visible(llama: Path, skipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that reports itself done without reading: without poison it would serve the last unit's weights."""
    config = lema_config(llama)
    adapter = get_adapter("llama", json.loads((llama / "config.json").read_text()))
    adapter.configure(torch.float32, "eager")
    gbi = GlobalBinaryIndex(llama)
    memory = WeightStore(gbi, adapter, strategy_plan(gbi, adapter), "cpu", poison=True)
    manager = LoRAManager({"r": 4, "alpha": 8, "target_modules": "all-linear"}, device="cpu", seed=7)
    manager.attach(adapter)
    trainer = lema.LemaTrainer(
        config, adapter, memory.gbi, manager, Recorder(manager.get_trainable_parameters()), memory
    )
    submit = memory._reader.submit

    def skipping(job: Any) -> None:
        if skipped and job.extents == memory._layers[2].layout.extents:
            job = ReadJob([], job.buffer, job.cancelled, job.done)
        submit(job)

    monkeypatch.setattr(memory._reader, "submit", skipping)
    if skipped:
        with pytest.raises(lema.errors.NonFiniteError, match="layer 2"):
            trainer.train_step(padded_batch())
        assert isinstance(trainer.optimizer, Recorder)
        assert trainer.optimizer.steps == 0
    else:
        plain = plain_model(llama)
        expected_loss, expected = plain_step(plain, padded_batch())
        _, loss = trainer.train_step(padded_batch())
        assert loss is not None
        assert relative(loss, expected_loss) <= 1e-6
        assert not differing(expected, recorded(trainer, trainer.model))
    memory.close()


@pytest.mark.parametrize("call", [1, 3, 5, 6, 7])
def test_nothing_stale_after_a_read_error(pair: Pair, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th read of a step fails: a typed error that names file and tensor, and the next step is undisturbed."""
    batch = padded_batch()
    expected_loss, expected = plain_step(pair.plain, batch)
    trainer = recording_trainer(pair.model)
    lema_step(pair.model, batch, trainer)
    pair.model.memory.abort()
    preadv = os.preadv
    count = 0

    def failing(descriptor: int, buffers: Any, offset: int, *rest: Any) -> int:
        nonlocal count
        count += 1
        if count == call:
            raise OSError(5, "Input/output error")
        return preadv(descriptor, buffers, offset, *rest)

    monkeypatch.setattr(os, "preadv", failing)
    steps = trainer.optimizer.steps  # type: ignore[attr-defined]
    failed = 0
    for _ in range(4):
        try:
            trainer.train_step(batch)
        except ReadError as caught:
            said = str(caught)
            failed += 1
            assert "model.safetensors" in said
            assert "model.layers." in said
            assert all(p.grad is None for p in pair.model.get_trainable_parameters())
        else:
            assert not differing(expected, recorded(trainer, pair.model.hf_model))
    assert count > call
    assert failed == 1
    assert trainer.optimizer.steps == steps + 3  # type: ignore[attr-defined]
    loss, found = lema_step(pair.model, batch, trainer)
    assert relative(loss, expected_loss) <= 1e-6
    assert not differing(expected, found)
