"""Families chosen by kind, as the sweep over all trains each: a tiny model with every kind of layer, three steps.

The families of `families.py` are compared in more ways in `test_exact.py`, composite ones in
`models/test_composites.py`; `python -m benchmarks.families` goes through all there are.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import families, tiny_families

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore"),  # families' own, of which there are many
]
KINDS = {
    "latent attention": ("deepseek_v3", "minicpm3", "axk1", "kimi_linear"),
    "an indexer that chooses positions": ("deepseek_v32", "glm_moe_dsa"),
    "keys and values of an earlier layer": ("gemma3n_text", "gemma4:E2B"),
    "mixtures": ("afmoe", "glm4_moe", "jetmoe", "laguna", "minimax_m2", "phimoe", "flex_olmo", "dbrx"),
    "state space and linear attention": (
        "nemotron_h",
        "olmo_hybrid",
        "rwkv",
        "xlstm",
        "falcon_mamba",
        "bailing_hybrid",
    ),
    "modules between decoder and head": ("modernbert-decoder", "roberta", "electra"),
    "of early days": ("gpt_neo", "codegen", "xglm", "persimmon", "gpt_bigcode"),
    "a tower beside the text": (
        "aria",
        "idefics3",
        "internvl",
        "llava",
        "glm4v_moe",
        "kimi_k25",
        "lfm2_vl",
        "paligemma",
    ),
    "a tower inside the decoder": ("phi4_multimodal",),
    "a tower that hears": ("voxtral", "granite_speech"),
}
OFTEN = (
    "deepseek_v3",
    "gemma3n_text",
    "afmoe",
    "nemotron_h",
    "modernbert-decoder",
    "llava",
    "phi4_multimodal",
    "voxtral",
)
"""One of a kind, in the tests of every day."""


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=f"{kind}-{family}", marks=() if family in OFTEN else pytest.mark.long)
        for kind, some in KINDS.items()
        for family in some
    ],
)
def test_three_steps_are_plain_pefts_to_the_last_bit(family: str, tmp_path: Path) -> None:
    if family not in tiny_families.families():
        pytest.skip("not of the installed transformers")
    outcome = families.examine(family, tmp_path)
    assert (outcome.result, outcome.reason) == ("equal", "")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bart", "the loss of BartForCausalLM is not that of the next tokens alone"),
        ("t5gemma2", "is an encoder with a decoder"),
        ("ctrl", "0 lists of decoder layers"),
        pytest.param("hrm_text", "2 lists of decoder layers", marks=pytest.mark.long),
    ],
)
def test_what_is_refused_says_why(family: str, reason: str, tmp_path: Path) -> None:
    outcome = families.examine(family, tmp_path)
    assert outcome.result == "refused"
    assert reason in outcome.reason


def test_a_family_that_dies_or_hangs_is_a_line_like_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os
    import time

    def examine(family: str, folder: Path) -> families.Outcome:
        if family == "dies":
            os._exit(3)
        if family == "hangs":
            time.sleep(30)
        return families.Outcome(family, "equal", "")

    monkeypatch.setattr(families, "examine", examine)
    found = {o.family: (o.result, o.reason) for o in families.sweep(["dies", "hangs", "good"], seconds=1)}
    assert found == {
        "dies": ("crash", "its process ended with status 3"),
        "hangs": ("crash", "no end after 1 s"),
        "good": ("equal", ""),
    }


def test_the_page_counts_what_it_lists() -> None:
    outcomes = [
        families.Outcome("one", "equal", "", "OneForCausalLM", "4 OneLayer"),
        families.Outcome("two", "refused", "it is two", "TwoForCausalLM"),
    ]
    page = "\n".join(families.page(outcomes))
    for line in ("- **equal**, 1:", "- **refused**, 1:", "- **wrong**, 0:", "| one | OneForCausalLM | 4 OneLayer |",
                 "| two | TwoForCausalLM | it is two |"):  # fmt: skip
        assert line in page


def test_a_tiny_model_has_every_kind_of_layer_of_its_family() -> None:
    config = tiny_families.tiny_config("gemma3").text_config
    assert sorted(set(config.layer_types)) == ["full_attention", "sliding_attention"]
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (len(config.layer_types), 64, 128)
    assert tiny_families.tiny_config("mistral3:ministral3").text_config.model_type == "ministral3"
    assert len(tiny_families.families()) > 150
