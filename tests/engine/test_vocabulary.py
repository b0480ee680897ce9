"""Loss and gradient of a head that comes in pieces of the vocabulary, against the whole head's."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from heads import EVEN, ONE_ROW, UNEVEN, VOCAB, Models, Pieces, distance, vocabulary_loss
from helpers import Everywhere64, relative
from lema.engine.loss.epilogue import ModelEpilogue
from lema.engine.loss.positions import LossResult, compute_loss
from lema.engine.loss.vocabulary import Head
from lema.errors import InputError, UnsupportedError
from lema.models.interceptor import Interceptor
from rounding import head_gradient_bound

pytestmark = pytest.mark.timeout(120)

SPECIAL = ("llama", "gemma2", "cohere", "granite", "gpt2", "gptj", "phi")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Models]:
    """Models of a family in a type, made once."""
    made: dict[Any, Models] = {}

    def get(family: str, dtype: torch.dtype = torch.float32) -> Models:
        if (family, dtype) not in made:
            made[family, dtype] = Models.of(family, tmp_path_factory.mktemp(family), dtype)
        return made[family, dtype]

    return get


def assert_as_exact(found: LossResult, plain: LossResult, reference: LossResult, floor: float = EPS) -> None:
    assert distance(found.gradient, reference.gradient) <= 1.5 * distance(plain.gradient, reference.gradient) + floor


@torch.no_grad()
def vocabulary_logits(lm: Any, hidden: torch.Tensor, chunks: Pieces) -> torch.Tensor:
    """Its logits."""
    epilogue = ModelEpilogue(lm)
    with epilogue.in_place():
        return epilogue(hidden, Head(epilogue.linear, chunks))


# -- families --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [[(0, VOCAB)], EVEN, UNEVEN, ONE_ROW], ids=["one", "even", "uneven", "one row"])
@pytest.mark.parametrize("family", SPECIAL)
def test_loss_and_gradient_are_the_whole_heads(models: Any, family: str, ranges: list[tuple[int, int]]) -> None:
    tiny = models(family)
    hidden, targets = tiny.batch()
    plain, reference = compute_loss(tiny.plain, hidden, targets, 17.0), tiny.reference(hidden, targets, 17.0)
    for positions in (1, 3, 1000):
        chunks = tiny.pieces(ranges)
        found = vocabulary_loss(tiny.headless, hidden, targets, 17.0, chunks, positions=positions)
        assert relative(found.loss, plain.loss) <= 1e-6
        assert relative(found.loss, reference.loss) <= 1e-6
        assert found.gradient is not None and found.gradient.shape == hidden.shape
        assert found.gradient.dtype == hidden.dtype
        assert found.logits is None
        assert_as_exact(found, plain, reference)
        assert chunks.used == list(range(len(ranges)))


def test_the_families_are_special_in_what_they_are_here_for(models: Any) -> None:
    for family in SPECIAL:
        tiny = models(family)
        hidden, _ = tiny.batch()
        bare = functional.linear(hidden, tiny.weight)
        assert torch.equal(bare, tiny.plain.logits(hidden)) == (family in ("llama", "gpt2")), family
        assert (tiny.plain.head.bias is not None) == (family in ("gptj", "phi")), family
    gpt2 = models("gpt2").plain.module
    assert gpt2.get_input_embeddings().weight is gpt2.get_output_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", SPECIAL)
def test_half_precision_is_as_exact_as_the_whole_heads(models: Any, family: str, dtype: torch.dtype) -> None:
    tiny = models(family, dtype)
    hidden, targets = tiny.batch()
    plain, reference = compute_loss(tiny.plain, hidden, targets, 17.0), tiny.reference(hidden, targets, 17.0)
    for ranges, positions in ((EVEN, 1000), (UNEVEN, 4), (ONE_ROW, 1000)):
        found = vocabulary_loss(tiny.headless, hidden, targets, 17.0, tiny.pieces(ranges), positions=positions)
        assert found.gradient is not None and found.gradient.dtype == dtype
        assert relative(found.loss, plain.loss) <= 1e-6
        assert_as_exact(found, plain, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_tokens_predicted_well_keep_their_small_gradients(models: Any, dtype: torch.dtype) -> None:
    tiny = models("llama", dtype)
    _, targets = tiny.batch()
    rows = tiny.weight.float()[targets.clamp_min(0)]
    for certainty in (4.0, 9.0, 14.0):
        towards = rows / rows.pow(2).sum(-1, keepdim=True)
        hidden = (towards * certainty).to(dtype)
        reference = tiny.reference(hidden, targets, 17.0)
        plain = compute_loss(tiny.plain, hidden, targets, 17.0, scale=4096.0)
        found = vocabulary_loss(tiny.headless, hidden, targets, 17.0, tiny.pieces(), scale=4096.0)
        assert reference.gradient is not None
        at_targets = targets != -100
        for one in (found, plain):  # each position weighs the same
            assert one.gradient is not None
            one.gradient.div_(reference.gradient.norm(dim=-1, keepdim=True).to(dtype) * 4096.0)
        unit = reference.gradient[at_targets] / reference.gradient[at_targets].norm(dim=-1, keepdim=True)
        assert found.gradient is not None and plain.gradient is not None
        own = distance(plain.gradient[at_targets], unit)
        assert distance(found.gradient[at_targets], unit) <= 1.5 * own + 4 * torch.finfo(dtype).eps, certainty


def test_autocast_reaches_the_linear_and_its_gradient(models: Any) -> None:
    tiny = models("gemma2")
    hidden, targets = tiny.batch()
    reference = tiny.reference(hidden, targets, 17.0)
    outside = vocabulary_loss(tiny.headless, hidden, targets, 17.0, tiny.pieces())
    with torch.autocast("cpu", torch.bfloat16):
        plain = compute_loss(tiny.plain, hidden, targets, 17.0)
        found = vocabulary_loss(tiny.headless, hidden, targets, 17.0, tiny.pieces())
        logits = vocabulary_logits(tiny.headless, hidden, tiny.pieces())
        expected = tiny.plain.logits(hidden)
    assert logits.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected)
    assert found.gradient is not None and found.gradient.dtype == torch.float32
    assert relative(found.loss, plain.loss) <= 1e-6
    assert_as_exact(found, plain, reference)
    assert distance(found.gradient, reference.gradient) > 100 * distance(outside.gradient, reference.gradient)


@pytest.mark.parametrize("family", SPECIAL)
def test_logits_are_the_whole_heads_but_for_rounding(models: Any, family: str) -> None:
    tiny = models(family)
    hidden, _ = tiny.batch()
    expected = tiny.plain.logits(hidden)
    for ranges in (EVEN, UNEVEN, ONE_ROW):
        chunks = tiny.pieces(ranges)
        found = vocabulary_logits(tiny.headless, hidden, chunks)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=8 * EPS, atol=64 * EPS)
        assert chunks.used == list(range(len(ranges)))


def test_a_model_generates_with_its_head_in_chunks(models: Any) -> None:
    tiny = models("gemma2")
    ids = torch.randint(3, VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))
    expected = tiny.plain.module.generate(ids, max_new_tokens=6, do_sample=False)
    head = tiny.headless.head
    head.__dict__["forward"] = Head(head, tiny.pieces())
    try:
        assert torch.equal(tiny.headless.module.generate(ids, max_new_tokens=6, do_sample=False), expected)
    finally:
        del head.__dict__["forward"]


# -- what it costs ---------------------------------------------------------------------------------


def test_two_products_a_chunk_and_never_more_logits_than_asked_for(models: Any) -> None:
    tiny = models("granite")
    hidden, targets = tiny.batch()
    vocabulary_loss(tiny.headless, hidden, targets, 1.0, tiny.pieces())  # the family is checked here
    count, width = int((targets != -100).sum()), hidden.shape[-1]
    with Costs() as costs:
        vocabulary_loss(tiny.headless, hidden, targets, 1.0, tiny.pieces(), positions=4)
    assert costs.products == 2 * count * width * VOCAB
    assert VOCAB not in costs.shapes
    assert costs.shapes[59] - {width} <= {1, 2, 3, 4}  # the chunk's weight, transposed, is `width` x 59
    with Costs() as costs:
        vocabulary_loss(tiny.headless, hidden, targets, 1.0, tiny.pieces(), positions=4, with_gradient=False)
    assert costs.products == count * width * VOCAB


class Costs(TorchDispatchMode):
    """Multiplications in matrix products, and of the tensors made meanwhile the rows by last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.shapes: dict[int, set[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and note."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "mm" in name:
            assert name in ("mm", "addmm", "addmm_"), name
            left, right = args[-2:]
            self.products += left.shape[0] * left.shape[1] * right.shape[1]
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1:
                self.shapes.setdefault(tensor.shape[-1], set()).add(tensor.shape[:-1].numel())
        return result


def test_a_family_is_checked_once(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = models("llama")
    hidden, targets = tiny.batch()
    vocabulary_loss(tiny.headless, hidden, targets, 1.0, tiny.pieces())
    calls = []
    run = tiny.headless.logits
    monkeypatch.setattr(tiny.headless, "logits", lambda rows: calls.append(1) or run(rows))
    vocabulary_loss(tiny.headless, hidden, targets, 1.0, tiny.pieces())
    assert len(calls) == len(UNEVEN) + 1


# -- positions and targets -------------------------------------------------------------------------


def test_positions_without_target_are_not_looked_at(models: Any) -> None:
    tiny = models("gemma2")
    hidden, targets = tiny.batch()
    expected = vocabulary_loss(tiny.headless, hidden, targets, 1.0, tiny.pieces())
    hidden[targets == -100] = torch.nan
    found = vocabulary_loss(tiny.headless, hidden, targets, 1.0, tiny.pieces())
    assert found.gradient is not None
    assert found.loss == expected.loss
    assert torch.equal(found.gradient, expected.gradient)
    assert not found.gradient[targets == -100].any()
    assert found.gradient[targets != -100].any(-1).all()


def test_without_any_target_nothing_is_used(models: Any) -> None:
    tiny = models("llama")
    hidden, targets = tiny.batch()
    chunks = tiny.pieces()
    found = vocabulary_loss(tiny.headless, hidden, torch.full_like(targets, -100), 1.0, chunks)
    assert found.loss == 0.0
    assert found.gradient is not None and torch.equal(found.gradient, torch.zeros_like(hidden))
    assert not chunks.used


def test_without_gradient_the_loss_is_the_same(models: Any) -> None:
    tiny = models("cohere")
    hidden, targets = tiny.batch()
    expected = vocabulary_loss(tiny.headless, hidden, targets, 5.0, tiny.pieces())
    found = vocabulary_loss(tiny.headless, hidden, targets, 5.0, tiny.pieces(), with_gradient=False)
    assert found.gradient is None
    assert found.loss == expected.loss


@pytest.mark.parametrize("target", [-1, VOCAB])
def test_a_target_outside_the_vocabulary_is_refused(models: Any, target: int) -> None:
    tiny = models("llama")
    hidden, targets = tiny.batch()
    targets[2, 2] = target
    with pytest.raises(InputError, match=f"targets from .*{target}.*rows 0..98"):
        vocabulary_loss(tiny.headless, hidden, targets, 1.0, tiny.pieces())


def test_nothing_joins_a_graph(models: Any) -> None:
    tiny = models("llama")
    hidden, targets = tiny.batch()
    expected = vocabulary_loss(tiny.headless, hidden, targets, 1.0, tiny.pieces())
    turned = hidden.transpose(0, 1).contiguous().requires_grad_().transpose(0, 1)
    chunks = Pieces(nn.Parameter(tiny.weight), UNEVEN)
    found = vocabulary_loss(tiny.headless, turned, targets, 1.0, chunks)
    assert found.gradient is not None and not found.gradient.requires_grad
    assert torch.equal(found.gradient, expected.gradient)


# -- large and small numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_logits_of_ten_thousand_do_not_overflow(models: Any, family: str) -> None:
    tiny = models(family)
    hidden, targets = tiny.batch(size=1e5)
    largest = functional.linear(hidden, tiny.weight).abs().max()
    assert largest > 1e4
    plain, reference = compute_loss(tiny.plain, hidden, targets, 17.0), tiny.reference(hidden, targets, 17.0)
    config = tiny.plain.module.config
    cap, scale = getattr(config, "final_logit_softcapping", None), getattr(config, "logits_scaling", 1.0)
    bound = head_gradient_bound(hidden, tiny.weight, targets, 17.0, cap, scale)
    assert reference.gradient is not None
    assert bound.max() <= 0.1 * tiny.weight.norm(dim=-1).mean() / 17.0, "a wrong token is off by a head row"
    for ranges in (EVEN, UNEVEN, ONE_ROW):
        found = vocabulary_loss(tiny.headless, hidden, targets, 17.0, tiny.pieces(ranges))
        assert relative(found.loss, plain.loss) <= 1e-6
        assert found.gradient is not None and bool(found.gradient.isfinite().all())
        assert bool(((found.gradient - reference.gradient).norm(dim=-1) <= bound).all())


def test_large_logits_of_half_precision_do_not_overflow(models: Any) -> None:
    tiny = models("llama", torch.float16)
    hidden, targets = tiny.batch(size=1000.0)
    assert functional.linear(hidden, tiny.weight).abs().max() > 300
    plain, reference = compute_loss(tiny.plain, hidden, targets, 17.0), tiny.reference(hidden, targets, 17.0)
    for ranges in (EVEN, UNEVEN, ONE_ROW):
        found = vocabulary_loss(tiny.headless, hidden, targets, 17.0, tiny.pieces(ranges))
        assert relative(found.loss, plain.loss) <= 1e-6
        assert_as_exact(found, plain, reference)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_not_hidden(models: Any, value: float) -> None:
    tiny = models("llama")
    hidden, targets = tiny.batch()
    hidden[2, 2, 0] = value
    for ranges in (EVEN, ONE_ROW):
        found = vocabulary_loss(tiny.headless, hidden, targets, 1.0, tiny.pieces(ranges))
        assert found.loss != found.loss
        assert found.gradient is not None and bool(found.gradient[2, 2].isnan().any())
        assert bool(found.gradient[2, 3].isfinite().all())


def test_the_loss_scale_is_there_before_half_precision_rounds(models: Any) -> None:
    tiny = models("llama", torch.float16)
    hidden, targets = tiny.batch()
    many = 2.0**20
    reference = tiny.reference(hidden, targets, many)
    unscaled = vocabulary_loss(tiny.headless, hidden, targets, many, tiny.pieces())
    scaled = vocabulary_loss(tiny.headless, hidden, targets, many, tiny.pieces(), scale=2.0**16)
    assert scaled.gradient is not None
    assert scaled.loss == unscaled.loss
    assert distance(unscaled.gradient, reference.gradient) > 0.05
    assert distance(scaled.gradient.double() / 2.0**16, reference.gradient) < 0.002


# -- made-up families ------------------------------------------------------------------------------


class MadeUp(nn.Module):
    """A head and what is done before and after it, for the engine to drive."""

    def __init__(
        self,
        vocab: int = 40,
        width: int = 8,
        before: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
        after: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda logits, hidden: logits,
        dtype: torch.dtype = torch.float64,
        bias: bool = False,
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(5)
        self.layers: Any = nn.ModuleList()
        self.head: Any = nn.Linear(width, vocab, bias=bias, dtype=dtype).requires_grad_(False)
        for parameter in self.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64))
        self.vocab_size, self.max_positions = vocab, None
        self.before, self.after = before, after
        self.interceptor = Interceptor()

    @property
    def module(self) -> nn.Module:
        return self

    def pass_on(self, hidden: torch.Tensor) -> Any:
        return hidden

    def hidden_states(self, **inputs: Any) -> torch.Tensor:
        raise AssertionError("there are no layers")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.after(self.head(self.before(hidden)), hidden)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, denominator: float) -> torch.Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="sum") / denominator


AFTER: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "nothing": lambda logits, _: logits,
    "cap": lambda logits, _: 7.0 * (logits / 7.0).tanh(),
    "its backward needs its result": lambda logits, _: logits.tanh(),
    "its backward needs its input": lambda logits, _: logits + logits.sin(),
}


@given(
    cuts=st.sets(st.integers(1, 39)),
    positions=st.integers(1, 20),
    targets=st.lists(st.one_of(st.just(-100), st.integers(0, 39)), min_size=1, max_size=18),
    size=st.sampled_from([0.01, 1.0, 30.0, 1000.0]),
    denominator=st.floats(0.5, 100.0),
    bias=st.booleans(),
    after=st.sampled_from(sorted(AFTER)),
)
@settings(max_examples=60, deadline=None)
def test_any_cut_gives_the_whole_heads_numbers(
    cuts: set[int], positions: int, targets: list[int], size: float, denominator: float, bias: bool, after: str
) -> None:
    lm = MadeUp(before=lambda x: 3.0 * x.tanh() + 0.1 * x, after=AFTER[after], bias=bias)
    chunks = Pieces(lm.head.weight, list(pairwise([0, *sorted(cuts), 40])))
    wanted = torch.tensor([targets])
    random = torch.Generator().manual_seed(len(targets))
    hidden = torch.randn(1, len(targets), 8, generator=random, dtype=torch.float64) * size
    plain = compute_loss(lm, hidden, wanted, denominator, scale=3.0)
    lm.head.weight = nn.Parameter(torch.full_like(lm.head.weight, torch.nan), requires_grad=False)
    found = vocabulary_loss(lm, hidden, wanted, denominator, chunks, positions=positions, scale=3.0)
    assert found.loss == pytest.approx(plain.loss, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(found.gradient, plain.gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_module_before_the_head_gets_its_gradient_from_any_cut(smoothing: float) -> None:
    random = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.randn(8, 6, generator=random, dtype=torch.float64))
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    lm = MadeUp(before=lambda x: functional.linear(x.tanh(), weight), after=AFTER["cap"])
    hidden = torch.randn(1, 9, 6, generator=random, dtype=torch.float64)
    targets = torch.tensor([[3, -100, 0, 39, 17, 17, -100, 38, 1]])
    how = {"scale": 3.0, "trained": [weight, unused], "smoothing": smoothing}
    plain = compute_loss(lm, hidden, targets, 7.0, **how)
    ((parameter, expected),) = plain.beside
    assert parameter is weight and bool(expected.any())
    chunks = Pieces(lm.head.weight, [(0, 5), (5, 33), (33, 40)])
    for found in (
        compute_loss(lm, hidden, targets, 7.0, chunk_size=2, **how),
        vocabulary_loss(lm, hidden, targets, 7.0, chunks, positions=2, **how),
    ):
        torch.testing.assert_close(found.gradient, plain.gradient, rtol=1e-9, atol=1e-13)
        ((parameter, gradient),) = found.beside
        assert parameter is weight
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13)
    made = torch.zeros_like(hidden).requires_grad_()
    plain.backward(made * 1.0)
    assert torch.equal(made.grad, plain.gradient) and torch.equal(weight.grad, expected) and unused.grad is None


def test_a_flat_softmax_over_a_wide_chunk_does_not_overflow_in_half_precision() -> None:
    lm = MadeUp(vocab=30000, dtype=torch.float16)
    lm.head.weight.abs_().add_(4.0)
    hidden = torch.full((1, 3, 8), 0.001, dtype=torch.float16)
    targets = torch.tensor([[1, 2, 29999]])
    plain = compute_loss(lm, hidden, targets, 3.0, scale=1024.0)
    reference = compute_loss(copy.deepcopy(lm).double(), hidden.double(), targets, 3.0, scale=1024.0)
    chunks = Pieces(lm.head.weight, [(0, 20000), (20000, 30000)])
    found = vocabulary_loss(lm, hidden, targets, 3.0, chunks, scale=1024.0)
    assert_as_exact(found, plain, reference)


def test_a_long_tail_counts_in_half_precision() -> None:
    lm = MadeUp(vocab=30000, dtype=torch.float16)
    lm.head.weight.copy_(torch.randn(30000, 8, generator=torch.Generator().manual_seed(1)) * 0.1 + 1.0)
    lm.head.weight[:, 0], lm.head.weight[0, 0], lm.head.weight[1, 0] = -17.0, 0.0, -8.0
    hidden = torch.zeros(1, 1, 8, dtype=torch.float16)
    hidden[..., 0] = 1.0
    targets = torch.tensor([[1]])
    reference = compute_loss(copy.deepcopy(lm).double(), hidden.double(), targets, 1.0)
    found = vocabulary_loss(lm, hidden, targets, 1.0, Pieces(lm.head.weight, [(0, 30000)]))
    plain = compute_loss(lm, hidden, targets, 1.0, scale=1024.0)
    assert plain.gradient is not None
    plain.gradient.div_(1024.0)
    assert_as_exact(found, plain, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_family_that_widens_its_logits_is_as_exact(dtype: torch.dtype) -> None:
    lm = MadeUp(after=lambda logits, _: 3.0 * logits.float().tanh(), dtype=dtype)
    random = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 9, 8, generator=random).to(dtype)
    targets = torch.randint(0, 40, (2, 9), generator=random)
    plain = compute_loss(lm, hidden, targets, 18.0)
    with Everywhere64():
        reference = compute_loss(copy.deepcopy(lm).double(), hidden.double(), targets, 18.0)
    found = vocabulary_loss(lm, hidden, targets, 18.0, Pieces(lm.head.weight, [(0, 13), (13, 40)]))
    assert found.gradient is not None and found.gradient.dtype == dtype
    assert relative(found.loss, plain.loss) <= 1e-6
    assert_as_exact(found, plain, reference)


def test_a_target_that_outdoes_all_others_has_no_loss() -> None:
    lm = MadeUp(vocab=2)
    lm.head.weight.copy_(torch.tensor([[1000.0], [-1000.0]]).expand(2, 8))
    hidden = torch.ones(1, 2, 8, dtype=torch.float64)
    found = vocabulary_loss(lm, hidden, torch.tensor([[0, 1]]), 1.0, Pieces(lm.head.weight, [(0, 1), (1, 2)]))
    assert found.loss == 16000.0
    assert found.gradient is not None
    assert not found.gradient[0, 0].any()
    assert torch.equal(found.gradient[0, 1], lm.head.weight[0] - lm.head.weight[1])
    alone = MadeUp(vocab=1)
    found = vocabulary_loss(alone, hidden, torch.tensor([[0, 0]]), 1.0, Pieces(alone.head.weight, [(0, 1)]))
    assert found.loss == 0.0
    assert found.gradient is not None and not found.gradient.any()


def _masked(logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    logits = logits.clone()
    logits[..., 7:8] = -torch.inf
    return logits


REFUSED: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], str]] = {
    "normalised": (lambda logits, _: logits.log_softmax(-1), "rest of the vocabulary"),
    "one token masked": (_masked, "the place in it"),
    "scaled by the hidden states": (lambda logits, hidden: logits * hidden.norm(), "more than its head's outputs"),
    "cut": (lambda logits, _: logits[..., :39], "39 logits of 40 head rows"),
    "padded": (lambda logits, _: functional.pad(logits, (0, 1)), "41 logits of 40 head rows"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_family_that_cannot_be_done_in_pieces_is_refused(name: str) -> None:
    after, message = REFUSED[name]
    lm = MadeUp(after=after)
    _refused(lm, message)


def test_heads_and_losses_of_another_kind_are_refused() -> None:
    twice = MadeUp()
    twice.logits = lambda hidden: twice.head(hidden) + twice.head(hidden)  # type: ignore[method-assign]
    _refused(twice, "uses its head 2 times")
    never = MadeUp()
    never.logits = lambda hidden: functional.linear(hidden, never.head.weight)  # type: ignore[method-assign]
    _refused(never, "uses its head 0 times")
    smooth = MadeUp()
    smooth.loss = lambda logits, targets, denominator: (  # type: ignore[method-assign]
        functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=0.1)
        / denominator
    )
    _refused(smooth, "another loss")
    smaller = MadeUp()
    smaller.vocab_size = 39
    _refused(smaller, "a vocabulary of 39")
    deeper = MadeUp()
    weight, deeper.head = deeper.head.weight, nn.Sequential(deeper.head)
    _refused(deeper, "is Sequential", weight)


def _refused(lm: MadeUp, message: str, weight: torch.Tensor | None = None) -> None:
    hidden = torch.ones(1, 2, 8, dtype=torch.float64)
    chunks = Pieces(lm.head.weight if weight is None else weight, [(0, 13), (13, 40)])
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=f"MadeUp.*{message}"):
            vocabulary_loss(lm, hidden, torch.tensor([[1, 2]]), 1.0, chunks)
    assert not chunks.used


# -- the head is left as it was --------------------------------------------------------------------


@pytest.mark.parametrize("replaced", [False, True], ids=["own forward", "another's forward"])
def test_the_heads_forward_is_put_back_after_errors(models: Any, replaced: bool) -> None:
    tiny = models("llama")
    hidden, targets = tiny.batch()
    head = tiny.headless.head
    if replaced:
        head.__dict__["forward"] = lambda x: 2 * x
    before = head(hidden).detach()

    class Broken(Pieces):
        @contextlib.contextmanager
        def use(self, chunk: int) -> Iterator[torch.Tensor]:
            with super().use(chunk) as weight:
                yield weight.double() if chunk == 3 else weight

    try:
        for chunks, error in ((tiny.pieces(), None), (Broken(tiny.weight, UNEVEN), RuntimeError)):
            for run in (
                lambda chunks=chunks: vocabulary_loss(tiny.headless, hidden, targets, 1.0, chunks, with_gradient=False),
                lambda chunks=chunks: vocabulary_logits(tiny.headless, hidden, chunks),
            ):
                with pytest.raises(error) if error else contextlib.nullcontext():
                    run()
                torch.testing.assert_close(head(hidden).detach(), before, rtol=0, atol=0, equal_nan=True)
    finally:
        tiny.headless.interceptor.take_off("epilogue")
        assert ("forward" in head.__dict__) is replaced
        head.__dict__.pop("forward", None)


def test_a_forward_that_is_put_there_later_is_passed_by_too(models: Any) -> None:
    tiny = models("llama")
    hidden, targets = tiny.batch()
    head, interceptor = tiny.headless.head, tiny.headless.interceptor
    expected = vocabulary_loss(tiny.headless, hidden, targets, 1.0, tiny.pieces()).loss
    for _ in range(2):
        head.forward = lambda x: 2 * x
        assert vocabulary_loss(tiny.headless, hidden, targets, 1.0, tiny.pieces()).loss == expected
        assert torch.equal(head(hidden), 2 * hidden)
    interceptor.take_off("epilogue")
    del head.forward
