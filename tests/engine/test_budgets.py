"""The engine under plans: layers that stay, activations that are kept, a head in pieces, and budgets.

Whatever is kept where, numbers are plain PEFT's; what changes is how often weights are read and layers run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lema
from families import save_tiny
from helpers import (
    ALPHA,
    RANK,
    SEED,
    Batch,
    Gradients,
    Pair,
    Recorder,
    adapter_of,
    assert_as_exact_as_plain,
    differing,
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
)
from lema.engine.assembly import StoredModel
from lema.engine.loss.streamed_head import StreamedHead
from lema.engine.loss_scale import LossScale
from lema.engine.outlook import Outlook
from lema.engine.trainer import LemaTrainer
from lema.errors import ConfigError, ReadError, UnsupportedError
from lema.models import get_adapter
from lema.models.base import LemaModelAdapter
from lema.models.lora import LoRAManager
from lema.planning import footprint, policy, probe
from lema.planning.hardware import Hardware
from lema.planning.plan import MemoryPlan, evenly
from lema.planning.policy import plan_for
from lema.storage.index import GlobalBinaryIndex
from lema.streaming.layer_call import LayerGraph
from lema.streaming.recompute import StreamedLayer
from lema.streaming.weight_store import WeightStore

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
LAYERS, ROWS, LENGTH = 4, 4, 10
FEW = ("llama", "gpt2", "gemma2", "cohere", "phi")
MACHINE = Hardware(
    "made up", "cpu", 0, 8 * 10**9, 1e6, math.inf, dict.fromkeys(("float32", "bfloat16", "float16"), 1e9)
)
"""With a disk so slow that every layer is worth keeping."""


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "profile", lambda device, path=None: MACHINE)


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of the tiny head is 31 of its 99 rows."""
    monkeypatch.setattr(footprint, "HEAD_CHUNK_BYTES", 31 * 32 * 4)


class Runs(Counter[int]):
    """How often each layer has run."""

    @contextlib.contextmanager
    def counted(self) -> Iterator[Runs]:
        """Count inside the block."""
        run = StreamedLayer.run

        def counting(layer: StreamedLayer, *args: Any) -> Any:
            if not isinstance(layer, StreamedHead):
                self[layer.unit] += 1
            return run(layer, *args)

        StreamedLayer.run = counting  # type: ignore[method-assign]
        try:
            yield self
        finally:
            StreamedLayer.run = run  # type: ignore[method-assign]


def pair_of(folder: Path, **settings: Any) -> Pair:
    """Plain PEFT and a model whose plan is for this file's batch."""
    return Pair.of(folder, **{"batch_size": ROWS, "max_seq_length": LENGTH, **settings})


def plan_of(pair: Pair) -> MemoryPlan:
    """The plan of a pair's streamed model."""
    plan = pair.model.memory.plan
    assert plan is not None
    return plan


def steady_loads(streamed: int, slots: int) -> int:
    """Loads of a step of units that share slots."""
    return 2 * max(streamed - slots, 0)


# -- every plan of a small model ---------------------------------------------------------------------


class Llama:
    """A plain step, and trainers of the same model under any plan."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plain = plain_model(folder)
        randomise(self.plain)
        self.batch = padded_batch(ROWS, LENGTH)
        self.loss, self.gradients = plain_step(self.plain, self.batch)
        layout = GlobalBinaryIndex(folder)
        self.unit_bytes = [
            sum(layout.record(name).nbytes for name in layout.keys if name.startswith(f"model.layers.{unit}."))
            for unit in range(LAYERS)
        ]
        self.head_bytes = layout.record("lm_head.weight").nbytes

    def trainer(self, plan: MemoryPlan, lora: dict[str, Any] | None = None, **config: Any) -> LemaTrainer:
        """Over slots that are poisoned before each load."""
        adapter = get_adapter("llama", json.loads((self.folder / "config.json").read_text()))
        adapter.configure(torch.float32, "eager")
        memory = WeightStore(GlobalBinaryIndex(self.folder), adapter, plan, "cpu", poison=True)
        settings = {"r": RANK, "alpha": ALPHA, "target_modules": "all-linear", **(lora or {})}
        manager = LoRAManager(settings, device="cpu", seed=SEED)
        manager.attach(adapter)
        optimizer = Recorder(manager.get_trainable_parameters())
        config = {"batch_size": ROWS, "max_seq_length": LENGTH, **config}
        trainer = LemaTrainer(lema_config(self.folder, **config), adapter, memory.gbi, manager, optimizer, memory)
        own = adapter_of(self.plain)
        with torch.no_grad():
            for name, parameter in adapter_of(trainer.model).items():
                parameter.copy_(own[name])
        return trainer


@pytest.fixture(scope="module")
def llama(tiny: Any) -> Llama:
    return Llama(tiny("llama", tie_word_embeddings=False))


def made_plan(ram: int = 0, keep: int = 0, slots: int = 2, head: str = "resident", **changes: Any) -> MemoryPlan:
    """Like the planner's: `ram` layers evenly spaced, and the last `keep` of those that can."""
    in_ram = evenly(ram, LAYERS)
    disk = tuple(unit for unit in range(LAYERS) if unit not in in_ram)
    able = sorted((*in_ram, *disk[-slots:]))
    plan = MemoryPlan(
        device="cpu", on_device=(), in_ram=in_ram, from_disk=disk, keep_activations=tuple(able[len(able) - keep :]),
        host_slots=slots, device_slots=2, batch=ROWS, seq=LENGTH, micro_batch_size=ROWS, loss_chunk_size=None,
        head=head, head_rows=99, boundaries="device", optimizer="device",
    )  # fmt: skip
    return replace(plan, **changes)


EVERY = [
    (ram, keep, slots)
    for slots in (2, 3, 4)
    for ram in range(LAYERS + 1)
    for keep in range(min(ram + min(slots, LAYERS - ram), LAYERS) + 1)
]


@pytest.mark.parametrize(("ram", "keep", "slots"), EVERY)
def test_every_plan_gives_every_bit(llama: Llama, ram: int, keep: int, slots: int) -> None:
    plan = made_plan(ram, keep, slots, head="resident" if (ram + keep) % 2 else "streamed")
    trainer = llama.trainer(plan)
    head = plan.head == "streamed"
    read_before = trainer.memory.stats.bytes_read
    for step in range(3):
        with Runs().counted() as runs:
            _, loss = trainer.train_step(llama.batch)
        assert loss is not None
        assert relative(loss, llama.loss) <= 1e-6
        assert not differing(llama.gradients, recorded(trainer, trainer.model))
        assert runs == {unit: 1 if unit in plan.keep_activations else 2 for unit in range(LAYERS)}
        report = trainer.last_step
        assert report is not None
        if step:
            assert report.loads == steady_loads(LAYERS - ram, slots) + head
    found = trainer.memory.stats.bytes_read - read_before
    assert not any(type(thing) is LayerGraph for thing in gc.get_objects()), "no graph outlives its backward"
    if len(plan.from_disk) <= slots:
        assert found == sum(llama.unit_bytes) + llama.head_bytes * (3 if head else 1), "layers that stay are read once"
    trainer.memory.close()


def test_a_layer_that_stays_is_loaded_once(llama: Llama) -> None:
    trainer = llama.trainer(made_plan(ram=2))
    loaded: Counter[int] = Counter()
    submit = trainer.memory._reader.submit
    extents = {state.layout.extents[0]: state.unit for state in trainer.memory._layers if state.layout is not None}

    def noting(job: Any) -> None:
        loaded[extents.get(job.extents[0], -1)] += 1
        submit(job)

    trainer.memory._reader.submit = noting  # type: ignore[method-assign]
    for _ in range(4):
        trainer.train_step(llama.batch)
    trainer.eval_step(llama.batch)
    trainer.train_step(llama.batch)
    kept = set(made_plan(ram=2).in_ram)
    assert {loaded[unit] for unit in kept} == {1}
    assert loaded[-1] == 1, "nor is a head that stays"
    trainer.memory.close()


def test_a_kept_graph_whose_weights_are_gone_raises_if_it_is_used(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the count of fillings stand autograd's own version counters: never a wrong number."""
    trainer = llama.trainer(made_plan(keep=2))
    monkeypatch.setattr(trainer.memory, "generation", lambda unit: 0)
    loss = trainer.model(**llama.batch).loss
    with torch.no_grad():
        trainer.model(**llama.batch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    trainer.memory.close()


@pytest.mark.parametrize("keep", [0, 3])
def test_micro_batches_load_nothing_more(llama: Llama, keep: int) -> None:
    whole = llama.trainer(made_plan(ram=1, keep=keep))
    for _ in range(2):
        whole.train_step(llama.batch)
    assert whole.last_step is not None
    cut = llama.trainer(made_plan(ram=1, keep=keep, micro_batch_size=1))
    with Runs().counted() as runs:
        for _ in range(2):
            cut.train_step(llama.batch)
    assert runs == {u: 2 * ROWS * (1 if u in made_plan(1, keep).keep_activations else 2) for u in range(LAYERS)}
    assert cut.last_step is not None
    assert cut.last_step.loads == whole.last_step.loads == steady_loads(3, 2)
    assert cut.last_step.bytes_read == whole.last_step.bytes_read == 2 * llama.unit_bytes[0]
    whole.memory.close()
    cut.memory.close()


@pytest.mark.parametrize("micro", [1, 3])
def test_kept_micro_batches_are_the_recomputed_ones(llama: Llama, micro: int) -> None:
    found = []
    for keep in (0, 4):
        trainer = llama.trainer(made_plan(ram=2, keep=keep, micro_batch_size=micro))
        _, loss = trainer.train_step(llama.batch)
        found.append((loss, recorded(trainer, trainer.model)))
        trainer.memory.close()
    assert found[0][0] == found[1][0]
    assert not differing(found[0][1], found[1][1])
    pair = Pair(llama.folder, llama.plain, None)  # type: ignore[arg-type]
    assert_as_exact_as_plain(pair.reference(llama.batch), llama.gradients, found[1][1])


def test_adapters_on_upper_layers_only(llama: Llama) -> None:
    """Lower layers have no graph to keep; their weights stay all the same."""
    upper = {"layers_to_transform": [2, 3], "target_modules": ["q_proj", "down_proj"]}
    plain = plain_model(llama.folder, targets=upper["target_modules"], layers_to_transform=[2, 3])
    for keep in (0, 2, 4):
        trainer = llama.trainer(made_plan(ram=2, keep=keep), upper)
        randomise(plain, trainer.model)
        expected_loss, expected = plain_step(plain, llama.batch)
        for _ in range(2):
            with Runs().counted() as runs:
                _, loss = trainer.train_step(llama.batch)
            assert loss is not None
            assert relative(loss, expected_loss) <= 1e-6
            assert not differing(expected, recorded(trainer, trainer.model))
        kept = made_plan(ram=2, keep=keep).keep_activations
        assert runs == {0: 1, 1: 1, 2: 2 - (2 in kept), 3: 2 - (3 in kept)}
        trainer.memory.close()


def test_nothing_stale_after_a_read_error_under_kept_graphs(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = llama.trainer(made_plan(ram=1, keep=3))
    trainer.train_step(llama.batch)
    trainer.memory.abort()
    preadv, failed = os.preadv, 0

    def failing(*args: Any) -> int:
        monkeypatch.setattr(os, "preadv", preadv)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    for _ in range(3):
        try:
            _, loss = trainer.train_step(llama.batch)
        except ReadError:
            failed += 1
            continue
        assert loss is not None
        assert relative(loss, llama.loss) <= 1e-6
        assert not differing(llama.gradients, recorded(trainer, trainer.model))
    assert failed == 1
    trainer.memory.close()


# -- families, through their configuration -----------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {"ram_layers": 2, "keep_activations": 3},
    {"ram_layers": 4, "keep_activations": 4, "head": "streamed", "num_slots": 3},
    {"keep_activations": 2},
    {"ram_budget": "2GB"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("family", FEW)
def test_families_under_plans(tiny: Any, family: str, settings: dict[str, Any]) -> None:
    pair = pair_of(tiny(family, tie_word_embeddings=family != "gpt2"), **settings)
    batch = padded_batch(ROWS, LENGTH)
    expected_loss, expected = plain_step(pair.plain, batch)
    plan, trainer = plan_of(pair), recording_trainer(pair.model)
    for _ in range(2):
        with Runs().counted() as runs:
            loss, found = lema_step(pair.model, batch, trainer)
        assert relative(loss, expected_loss) <= 1e-6
        assert not differing(expected, found)
        assert sum(runs.values()) == 2 * LAYERS - len(plan.keep_activations)
    assert len(plan.in_ram) >= settings.get("ram_layers", 0)
    assert len(plan.keep_activations) == settings.get("keep_activations", LAYERS)
    assert trainer.last_step is not None
    assert trainer.last_step.loads == steady_loads(len(plan.from_disk), plan.host_slots) + (plan.head == "streamed")
    pair.close()


@pytest.mark.parametrize("settings", [{"ram_layers": 2, "keep_activations": 4}, {"keep_activations": 2}], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["lora", "gpt2's own"])
def test_dropout_draws_the_same_numbers(tiny: Any, own: bool, settings: dict[str, Any]) -> None:
    if own:
        pair = pair_of(tiny("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1), **settings)
    else:
        pair = pair_of(tiny("llama"), lora_dropout=0.3, **settings)
    batch, trainer, seen = padded_batch(ROWS, LENGTH), recording_trainer(pair.model), []
    for seed in (3, 4):
        torch.manual_seed(seed)
        expected_loss, expected = plain_step(pair.plain, batch)
        after = torch.rand(3)
        torch.manual_seed(seed)
        loss, found = lema_step(pair.model, batch, trainer)
        assert torch.equal(torch.rand(3), after)
        assert relative(loss, expected_loss) <= 1e-6
        assert not differing(expected, found)
        seen.append(expected)
    assert differing(*seen), "dropout was off, so this test tests nothing"
    pair.close()


# -- callers who do something else in between --------------------------------------------------------


def _evaluate(pair: Pair) -> None:
    for model in (pair.plain, pair.model.hf_model):
        with torch.no_grad():
            model(**padded_batch(ROWS, LENGTH, seed=5), use_cache=False)


def _generate(pair: Pair) -> None:
    tokens = pair.model.generate(padded_batch()["input_ids"][2:3], max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 13)


def _other_step(pair: Pair) -> None:
    for model in (pair.plain, pair.model.hf_model):
        model(**padded_batch(ROWS, LENGTH, seed=5), use_cache=False).loss.backward()


def _nothing(pair: Pair) -> None:
    pass


@pytest.mark.parametrize("between", [_nothing, _evaluate, _generate, _other_step], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "settings",
    [{"keep_activations": 2}, {"ram_layers": 2, "keep_activations": 4}, {"ram_layers": 1, "keep_activations": 3}],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_something_in_between_makes_kept_graphs_stale(
    tiny: Any, family: str, settings: dict[str, Any], between: Any
) -> None:
    """A graph whose weights were overwritten since is not used: its layer is computed again."""
    pair = pair_of(tiny(family), **settings)
    plan = plan_of(pair)
    pair.model.hf_model.train()
    losses = [model(**padded_batch(ROWS, LENGTH), use_cache=False).loss for model in (pair.plain, pair.model.hf_model)]
    between(pair)
    losses[0].backward()
    with Runs().counted() as runs:
        losses[1].backward()
    assert torch.equal(losses[0], losses[1])
    assert not differing(gradients_of(pair.plain), gradients_of(pair.model.hf_model))
    slot_of = {unit: rank % plan.host_slots for rank, unit in enumerate(plan.from_disk)}
    shared = {unit for unit, slot in slot_of.items() if list(slot_of.values()).count(slot) > 1}
    good = set(plan.keep_activations) - (shared if between is not _nothing else set())
    assert runs == {unit: 1 for unit in range(LAYERS) if unit not in good}
    if plan.in_ram:
        assert good, "what stays is not overwritten by anything"
    pair.close()


@pytest.mark.parametrize("settings", [{"keep_activations": 2}, {"ram_layers": 2, "keep_activations": 4}], ids=str)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_the_backward_of_both(tiny: Any, settings: dict[str, Any], order: tuple[int, int]) -> None:
    pair = pair_of(tiny("llama"), **settings)
    both = []
    pair.model.hf_model.train()
    for model in (pair.plain, pair.model.hf_model):
        losses = [model(**padded_batch(ROWS, LENGTH, seed=seed), use_cache=False).loss for seed in (1, 2)]
        for number in order:
            losses[number].backward()
        both.append((losses, gradients_of(model)))
    (expected_losses, expected), (losses, found) = both
    assert all(torch.equal(a, b) for a, b in zip(expected_losses, losses, strict=True))
    assert not differing(expected, found)
    pair.close()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("settings", [{"keep_activations": 2}, {"ram_layers": 4, "keep_activations": 4}], ids=str)
def test_a_second_backward_through_the_same_forward(tiny: Any, settings: dict[str, Any], dropout: float) -> None:
    """The first takes the kept graphs; the second computes again, with the numbers drawn then."""
    pair = pair_of(tiny("llama"), lora_dropout=dropout, **settings)
    pair.model.hf_model.train()
    found = []
    for model in (pair.plain, pair.model.hf_model):
        torch.manual_seed(3)
        loss = model(**padded_batch(ROWS, LENGTH), use_cache=False).loss
        loss.backward(retain_graph=True)
        torch.rand(7)
        loss.backward()
        found.append(gradients_of(model))
    assert not differing(*found)
    pair.close()


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("settings", [{"keep_activations": 2}, {"ram_layers": 4, "keep_activations": 4}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_under_autocast(tiny: Any, family: str, settings: dict[str, Any], inside: bool) -> None:
    pair = pair_of(tiny(family), **settings)
    pair.model.hf_model.train()
    both = []
    for model in (pair.plain, pair.model.hf_model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**padded_batch(ROWS, LENGTH), use_cache=False).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        both.append((loss.detach(), gradients_of(model)))
    (expected_loss, expected), (loss, found) = both
    assert torch.equal(loss, expected_loss)
    assert not differing(expected, found)
    assert differing(plain_step(pair.plain, padded_batch(ROWS, LENGTH))[1], expected), "autocast did nothing"
    pair.close()


def test_accumulation(tiny: Any) -> None:
    """Unequal calls make the same window as without a plan, and the gradient of the one large batch."""
    whole = padded_batch(7, LENGTH)
    calls = [{name: value[rows] for name, value in whole.items()} for rows in (slice(0, 2), slice(2, 6), slice(6, 7))]
    found = []
    for settings in ({}, {"ram_layers": 2, "keep_activations": 4}):
        pair = pair_of(tiny("llama"), gradient_accumulation_steps=3, **settings)
        trainer = recording_trainer(pair.model)
        losses = [trainer.train_step(call)[1] for call in calls]
        assert trainer.global_step == 1
        found.append((losses, recorded(trainer, pair.model.hf_model)))
        if settings:
            _, plain = plain_step(pair.plain, whole)
            assert_as_exact_as_plain(pair.reference(whole), plain, found[1][1])
        pair.close()
    assert found[0][0] == found[1][0]
    assert not differing(found[0][1], found[1][1])


@pytest.mark.parametrize("settings", [{}, {"ram_budget": "2GB"}, {"ram_budget": "2GB", "micro_batch_size": 1}], ids=str)
def test_a_whole_window_runs_no_more_rows_at_once_than_a_call(tiny: Any, settings: dict[str, Any]) -> None:
    config = lema_config(tiny("llama"), batch_size=2, gradient_accumulation_steps=3, max_seq_length=LENGTH, **settings)
    with lema.LemaModel(config) as model:
        model.initialize_lora()
        trainer = model.get_trainer()
        seen: list[int] = []
        self_attn = trainer.lm.layers[0].self_attn
        self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs.get("hidden_states", args[0] if args else None))),
            with_kwargs=True,
        )
        ids = torch.randint(3, 90, (6, LENGTH), generator=torch.Generator().manual_seed(1))
        with trainer.external_loop():
            trainer.train_step(ids, ids)
        assert trainer.global_step == 1
    assert set(seen) == {settings.get("micro_batch_size", 2)}


def test_a_forward_nobody_goes_back_through_holds_nothing(tiny: Any) -> None:
    pair = pair_of(tiny("llama"), ram_layers=4, keep_activations=4)
    pair.model.hf_model.train()
    output = pair.model.hf_model(**padded_batch(ROWS, LENGTH))
    assert sum(type(thing) is LayerGraph for thing in gc.get_objects()) == 4
    del output
    assert not any(type(thing) is LayerGraph for thing in gc.get_objects())
    with torch.no_grad():
        pair.model.hf_model(**padded_batch(ROWS, LENGTH))
        assert not any(type(thing) is LayerGraph for thing in gc.get_objects())
    pair.close()


# -- types and strategies ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_that_are_converted_at_each_use(tiny: Any, family: str) -> None:
    """Stored in float32, computed in bfloat16, through scratch: layers may stay, activations are not kept."""
    folder = tiny(family)
    batch = padded_batch(ROWS, LENGTH)
    for settings in ({"ram_layers": 2}, {"ram_budget": "2GB"}):
        pair = pair_of(folder, dtype=torch.bfloat16, **settings)
        plan = plan_of(pair)
        assert plan.keep_activations == ()
        assert plan.head == "resident"
        assert pair.model.memory._scratch.buffer.numel() > 0
        expected_loss, expected = plain_step(pair.plain, batch)
        trainer = recording_trainer(pair.model)
        for _ in range(2):
            loss, found = lema_step(pair.model, batch, trainer)
            assert relative(loss, expected_loss) <= 1e-6
            assert not differing(expected, found)
        assert trainer.last_step is not None
        assert trainer.last_step.loads == 0
        pair.close()
    for wrong in ({"keep_activations": 2}, {"head": "chunked"}):
        with pytest.raises(ConfigError, match=r"is not possible: .* Set (keep_activations=0|head='resident')"):
            lema_model(folder, dtype="bfloat16", **wrong)


def test_resident_without_a_budget_stays_whole(tiny: Any) -> None:
    pair = pair_of(tiny("llama"), strategy="resident", head="streamed")
    assert plan_of(pair).in_ram == (0, 1, 2, 3)
    batch = padded_batch(ROWS, LENGTH)
    expected = plain_step(pair.plain, batch)[1]
    trainer = recording_trainer(pair.model)
    for _ in range(2):
        assert not differing(expected, lema_step(pair.model, batch, trainer)[1])
    assert trainer.last_step is not None
    assert trainer.last_step.loads == 1, "the head, as was asked"
    pair.close()


@pytest.fixture
def small_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tiny model's own bytes decide."""
    monkeypatch.setattr(footprint, "CPU_OVERHEAD", 0)


def budget_for(folder: Path, **settings: Any) -> int:
    """Bytes that these decisions need, and no more."""
    config = lema_config(folder, batch_size=ROWS, max_seq_length=LENGTH, ram_budget="2GB", **settings)
    adapter = get_adapter("llama", json.loads((folder / "config.json").read_text()))
    adapter.configure(torch.float32, "eager")
    outlook = Outlook(config, StoredModel(adapter, GlobalBinaryIndex(folder)))
    return math.ceil(plan_for(outlook).host_peak / 0.96)


@pytest.mark.parametrize("strategy", ["resident", "streaming"])
@pytest.mark.parametrize("budget", ["2GB", "2 GiB", 2 * 10**9, "auto"])
def test_ways_to_say_a_budget(tiny: Any, budget: int | str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    if budget == "auto":
        free = policy.free_ram
        monkeypatch.setattr(policy, "free_ram", lambda: asked.append(free()) or asked[-1])
    pair = pair_of(tiny("llama"), ram_budget=budget, strategy=strategy)
    plan, batch = plan_of(pair), padded_batch(ROWS, LENGTH)
    nbytes = {"2 GiB": 2 << 30}.get(str(budget), 2 * 10**9) if not asked else asked[0] - max(asked[0] // 10, 256 << 20)
    assert 112 << 20 < plan.host_peak <= 0.96 * nbytes
    assert len(plan.from_disk) <= 2
    assert len(plan.keep_activations) == LAYERS
    assert (plan.head, plan.loss_chunk_size) == ("resident", None)
    assert (budget == "auto") == bool(asked)
    trainer = recording_trainer(pair.model)
    expected = plain_step(pair.plain, batch)[1]
    for _ in range(2):
        assert not differing(expected, lema_step(pair.model, batch, trainer)[1])
    assert trainer.last_step is not None
    assert trainer.last_step.bytes_read == 0
    pair.close()


def test_too_small_a_budget_is_refused_in_numbers(tiny: Any) -> None:
    folder = tiny("llama")
    with pytest.raises(ConfigError) as caught:
        lema_model(folder, ram_budget="50MB", batch_size=ROWS, max_seq_length=LENGTH)
    message = str(caught.value)
    for part in ("ram_budget 50 MB", "overhead 117 MB", "slots", "adapters", "max_seq_length"):
        assert part in message
    enough = re.search(r"Set ram_budget to at least (\d+MB)", message)
    assert enough is not None
    with lema_model(folder, ram_budget=enough[1], batch_size=ROWS, max_seq_length=LENGTH) as model:
        assert model.memory.plan is not None
        lema_step(model, padded_batch(ROWS, LENGTH))


def test_the_more_budget_the_more_is_kept(tiny: Any, small_overhead: None) -> None:
    """From what nothing kept needs to what everything kept needs; all numbers stay those of plain PEFT."""
    folder, batch = tiny("llama", tie_word_embeddings=False), padded_batch(ROWS, LENGTH)
    whole = {"micro_batch_size": ROWS, "head": "resident"}
    least = budget_for(folder, ram_layers=0, keep_activations=0, **whole)
    most = budget_for(folder, ram_layers=LAYERS, keep_activations=LAYERS, **whole)
    kept, expected = [], None
    for part in range(6):
        budget = least + (most - least) * part // 5
        pair = pair_of(folder, ram_budget=budget, **whole)
        plan = plan_of(pair)
        assert plan.host_peak <= budget
        kept.append((len(plan.from_disk) <= plan.host_slots, len(plan.in_ram) + len(plan.keep_activations)))
        expected = expected or plain_step(pair.plain, batch)[1]
        trainer = recording_trainer(pair.model)
        for _ in range(2):
            assert not differing(expected, lema_step(pair.model, batch, trainer)[1])
        pair.close()
    assert kept == sorted(kept)
    assert len(set(kept)) > 2, "parts are kept too"
    assert kept[-1] == (True, LAYERS + LAYERS - 2), "two layers never leave the two slots"


def test_layers_that_cannot_be_kept_are_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match=r"keep_activations=4 .* ram_layers=1 and num_slots=2") as caught:
        lema_model(tiny("llama"), ram_layers=1, keep_activations=4)
    assert "keep_activations to at most 3" in str(caught.value)
    lema_model(tiny("llama"), ram_layers=1, keep_activations=3).close()


def test_gradient_checkpointing_computes_everything_again(tiny: Any) -> None:
    for settings in ({"ram_budget": "2GB"}, {"ram_layers": 4}):
        pair = pair_of(tiny("llama"), gradient_checkpointing=True, **settings)
        assert plan_of(pair).keep_activations == ()
        with Runs().counted() as runs:
            _, found = lema_step(pair.model, padded_batch(ROWS, LENGTH))
        assert set(runs.values()) == {2}
        assert not differing(plain_step(pair.plain, padded_batch(ROWS, LENGTH))[1], found)
        pair.close()


class Own(LemaModelAdapter):
    """An adapter of somebody's own."""

    def __init__(self, config: dict[str, Any]) -> None:
        pass

    get_layer_metadata = get_param_names_for_layer = construct_layer_module = None  # type: ignore[assignment]
    forward_layer = release_layer_module = hidden_size = None  # type: ignore[assignment]


@pytest.mark.parametrize("settings", [{"ram_budget": "2GB"}, {"ram_layers": 1}, {"head": "chunked"}], ids=str)
def test_an_adapter_of_ones_own_has_no_plan(tiny: Any, settings: dict[str, Any]) -> None:
    folder = tiny("llama")
    with pytest.raises(UnsupportedError, match=r"budgets need a model of transformers, Own is .* leave .*ram_budget"):
        lema.LemaModel(lema_config(folder, **settings), adapter=Own({}))


# -- a head in chunks --------------------------------------------------------------------------------


@pytest.fixture(params=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "tied")


@pytest.mark.parametrize("more", [{}, {"loss_chunk_size": 5}, {"ram_layers": 2, "keep_activations": 4}], ids=str)
@pytest.mark.parametrize("family", FEW)
def test_a_chunked_head_is_as_exact_as_plain_peft(
    tiny: Any, family: str, tied: bool, more: dict[str, Any], in_pieces: None
) -> None:
    pair = pair_of(tiny(family, tie_word_embeddings=tied), head="chunked", **more)
    chunks = pair.model.memory.head_chunks
    assert chunks is not None
    assert [end - start for start, end in chunks.ranges] == [31, 31, 31, 6]
    batch = padded_batch(ROWS, LENGTH)
    expected_loss, plain = plain_step(pair.plain, batch)
    reference, trainer = pair.reference(batch), recording_trainer(pair.model)
    for _ in range(2):
        loss, found = lema_step(pair.model, batch, trainer)
        assert relative(loss, expected_loss) <= 1e-6
        assert found.keys() == plain.keys()
        assert_as_exact_as_plain(reference, plain, found)
    assert not pair.model.adapter.causal_lm().head.weight.any(), "the head is never there whole"
    pair.close()


def test_a_chunked_head_is_read_once_a_step(llama: Llama, in_pieces: None) -> None:
    """In the steady state a step reads the head's bytes beyond those of the layers, however many pieces there are."""
    rows = 31
    read = {}
    for head in ("resident", "chunked"):
        trainer = llama.trainer(made_plan(head=head, head_rows=rows if head == "chunked" else 99, loss_chunk_size=16))
        each = []
        for _ in range(4):
            before = trainer.memory.stats.bytes_read
            trainer.train_step(llama.batch)
            each.append(trainer.memory.stats.bytes_read - before)
        trainer.memory.close()
        read[head] = each
    assert len(set(read["resident"][1:])) == 1
    assert read["chunked"][2] - read["resident"][2] == llama.head_bytes
    assert len(set(read["chunked"][2:])) == 1


def test_a_chunked_head_answers_like_one_that_stays(tiny: Any, tied: bool, in_pieces: None) -> None:
    batch = padded_batch(ROWS, LENGTH)
    given = {name: batch[name][1:3] for name in ("input_ids", "attention_mask")}
    found = []
    for head in ("resident", "chunked"):
        folder = tiny("llama", tie_word_embeddings=tied)
        with lema_model(folder, batch_size=ROWS, max_seq_length=LENGTH, ram_layers=1, head=head) as model:
            randomise(model.hf_model)
            tokens = [
                model.generate(given, max_new_tokens=8, **how)
                for how in ({"do_sample": False}, {"num_beams": 3, "do_sample": False})
            ]
            trainer = recording_trainer(model)
            logits, loss = trainer.train_step(batch, return_logits=True)
            gradients = recorded(trainer, model.hf_model)
            evaluated, eval_loss = trainer.eval_step(batch, return_logits=True)
            bare, nothing = trainer.train_step(batch["input_ids"])
            assert nothing is None
            found.append((tokens, logits, loss, evaluated, eval_loss, bare, gradients))
    (tokens, *whole, _), (tokens_, *pieces, _) = found
    assert all(torch.equal(a, b) for a, b in zip(tokens, tokens_, strict=True))
    for expected, value in zip(whole, pieces, strict=True):
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)
    assert whole[0].shape == (ROWS, LENGTH, 99)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_autograd_goes_through_a_chunked_head(tiny: Any, family: str, tied: bool, in_pieces: None) -> None:
    """The whole model called as anyone calls it: loss, logits, and gradients of either."""
    pair = pair_of(tiny(family, tie_word_embeddings=tied), head="chunked", ram_layers=2, keep_activations=2)
    batch = padded_batch(ROWS, LENGTH)
    expected_loss, plain = plain_step(pair.plain, batch)
    reference = pair.reference(batch)
    pair.model.hf_model.train()
    output = pair.model.hf_model(**batch)
    output.loss.backward()
    assert relative(output.loss.item(), expected_loss) <= 1e-6
    assert_as_exact_as_plain(reference, plain, gradients_of(pair.model.hf_model))
    torch.testing.assert_close(output.logits, pair.plain(**batch, use_cache=False).logits, rtol=1e-5, atol=1e-5)
    found: list[Gradients] = []
    for model in (pair.plain, pair.model.hf_model):
        model(input_ids=batch["input_ids"], use_cache=False).logits.square().mean().backward()
        found.append(gradients_of(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)
    pair.close()


def test_a_chunked_head_under_autocast(tiny: Any, in_pieces: None) -> None:
    pair = pair_of(tiny("llama"), head="chunked")
    pair.model.hf_model.train()
    found = []
    for model in (pair.plain, pair.model.hf_model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**padded_batch(ROWS, LENGTH), use_cache=False).loss
        loss.backward()
        found.append((loss.item(), gradients_of(model)))
    (expected_loss, expected), (loss, gradients) = found
    assert relative(loss, expected_loss) <= 1e-3
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 0.03 * gradient.norm(), name
    pair.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_chunked_head_in_half_precision(tmp_path: Path, dtype: torch.dtype, in_pieces: None) -> None:
    """Stored in the type that is computed with, so that the head can stream."""
    save_tiny("llama", tmp_path).to(dtype).save_pretrained(tmp_path)
    pair = pair_of(tmp_path, dtype=dtype, head="chunked", ram_layers=2, keep_activations=4)
    assert pair.model.memory.head_chunks is not None
    assert len(pair.model.memory.head_chunks.ranges) == 2
    batch = padded_batch(ROWS, LENGTH)
    expected_loss, plain = plain_step(pair.plain, batch)
    trainer = recording_trainer(pair.model)
    trainer.trainables.loss_scale = LossScale(False)
    loss, found = lema_step(pair.model, batch, trainer)
    assert relative(loss, expected_loss) <= 1e-2
    assert_as_exact_as_plain(pair.reference(batch), plain, found, floor=4 * torch.finfo(dtype).eps)
    pair.close()


def test_a_read_error_of_a_chunk_names_the_head(tiny: Any, in_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lema_model(tiny("llama", tie_word_embeddings=False), head="chunked", ram_layers=4, batch_size=ROWS)
    trainer = recording_trainer(model)
    loss, gradients = lema_step(model, padded_batch(ROWS, LENGTH), trainer)
    model.memory.abort()
    record, preadv = model.gbi.record("lm_head.weight"), os.preadv
    layers = max(model.gbi.record(n).offset + model.gbi.record(n).nbytes for n in model.gbi.keys if ".layers." in n)
    assert record.offset >= layers or record.offset + record.nbytes <= min(
        model.gbi.record(n).offset for n in model.gbi.keys if ".layers." in n
    )

    def failing(descriptor: int, buffers: Any, offset: int, *rest: Any) -> int:
        if record.offset - 4096 < offset < record.offset + record.nbytes:
            raise OSError(5, "Input/output error")
        return preadv(descriptor, buffers, offset, *rest)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(ReadError, match=r"lm_head\.weight.*model\.safetensors"):
        trainer.train_step(padded_batch(ROWS, LENGTH))
    monkeypatch.setattr(os, "preadv", preadv)
    again, found = lema_step(model, padded_batch(ROWS, LENGTH), trainer)
    assert again == loss
    assert not differing(gradients, found)
    model.close()


def test_steps_change_the_adapter_as_plain_peft_does(tiny: Any) -> None:
    """AdamW over layers of every kind: in RAM and from disk, kept and computed again."""
    pair = pair_of(tiny("llama"), ram_layers=2, keep_activations=3, head="streamed")
    optimizer = torch.optim.AdamW([p for p in pair.plain.parameters() if p.requires_grad], lr=1e-2)
    trainer = pair.model.get_trainer(torch.optim.AdamW(pair.model.get_trainable_parameters(), lr=1e-2))
    losses = []
    for step in range(6):
        batch: Batch = padded_batch(ROWS, LENGTH, seed=step % 2)
        expected = pair.plain(**batch, use_cache=False).loss
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        _, loss = trainer.train_step(batch)
        assert loss is not None
        assert relative(loss, expected.item()) <= 1e-6
        losses.append(loss)
        if step == 3:
            trainer.eval_step(batch)
    assert losses[4] < losses[0]
    assert not differing(dict(adapter_of(pair.plain)), dict(adapter_of(pair.model.hf_model)))
    pair.close()
