"""The [LEMA_REPLY] format with models: asked for, streamed, read, remembered, answered in batches, evaluated."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from chat_models import save_base, save_learned
from data_helpers import CHATML, VOCABULARY, make_tokenizer, write_jsonl
from families import save_tiny
from lema.chat import ChatModel, Conversation, Reply, Sampling
from lema.chat.answer import reply_of
from lema.cli.app import app
from lema.data.render import ChatRenderer
from lema.errors import ConfigError, InputError
from lema.export.merge import merge
from lema_reply.arms import ADAPTER, BASE_IN_FORMAT, BASE_PLAINLY, MODEL, arms_of
from lema_reply.grammar import CLOSE, OPEN, STOP, SYSTEM, LemaReply, prompt
from lema_reply.lema_format import TEMPLATE, asks_for_replies, in_format, to_closing_tag
from terminal import Terminal

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
NORWAY, OTHER = "Capital of Norway?", "One two?"
KEPT = LemaReply("Oslo", "It is.", "High").text()
LEFT = f"{OPEN}\nAnswer: three\nConfidence: Sure\n{CLOSE}"
GREEDY = Sampling(max_new_tokens=90, temperature=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer and a chat template of its own."""
    return save_base(tmp_path_factory.mktemp("base"), positions=640)


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has learned two replies by heart, one in the format and one that leaves it."""
    answers, template = [(NORWAY, KEPT), (OTHER, LEFT)], TEMPLATE.read_text(encoding="utf-8")
    return save_learned(base, tmp_path_factory.mktemp("run") / "final", answers, template, rank=32, loss=0.01)


@pytest.fixture(scope="module")
def chat_model(checkpoint: Path) -> Iterator[ChatModel]:
    with ChatModel.open(checkpoint, strategy="resident") as made:
        yield made


# -- the prompt, and what ends a reply -------------------------------------------------------------


def test_the_prompt_is_the_formats_and_holds_no_opening_tag(chat_model: ChatModel, base: Path) -> None:
    assert asks_for_replies(chat_model.renderer)
    text = Conversation(chat_model).prompt(NORWAY)
    assert text == prompt(NORWAY) == Conversation(chat_model, SYSTEM).prompt(NORWAY)
    assert text.endswith("<|assistant|>\n") and OPEN not in text
    with ChatModel.open(base, device="cpu", dtype="float32") as bare:
        assert not asks_for_replies(bare.renderer)
        assert not asks_for_replies(ChatRenderer(make_tokenizer(None)))
        asked = in_format(bare)
        assert asked.renderer.prompt([{"role": "user", "content": "x"}]) == prompt("x")
        assert in_format(chat_model) is chat_model


def test_the_closing_tag_stays_in_what_is_shown_and_remembered(chat_model: ChatModel) -> None:
    pieces: list[str] = []
    talk = Conversation(chat_model)
    reply = talk.ask(NORWAY, to_closing_tag(GREEDY), pieces.append)
    assert reply.text == "".join(pieces) == KEPT
    assert reply.ended_by == "stop"
    assert len(pieces) > 5, "they come one by one"
    assert talk.turns[1] == {"role": "assistant", "content": KEPT}
    system, user = f"<|system|>\n{SYSTEM}\n\n", f"<|user|>\n{NORWAY}\n\n"
    assert talk.prompt(OTHER) == f"{system}{user}<|assistant|>\n{KEPT}\n\n<|user|>\n{OTHER}\n\n<|assistant|>\n"
    cut = chat_model.reply(NORWAY, Sampling(90, 0, stop=(STOP,)))
    assert cut.text == KEPT.removesuffix(STOP), "unless it is told to stay, a stop text goes"


def test_padding_and_what_follows_an_end_is_no_part_of_an_answer() -> None:
    tokenizer = make_tokenizer(CHATML)
    words, end = tokenizer("one two three")["input_ids"], tokenizer.eos_token_id
    for padding in ([], [end] * 3, [0, 0]):
        whole = reply_of([*words, end, *padding], tokenizer, {end}, GREEDY, 1.0)
        assert (whole.text, whole.num_tokens, whole.ended_by) == ("one two three", len(words) + 1, "end")
        stopped = reply_of([*words, *padding], tokenizer, {end}, Sampling(stop=(" tw",), keep_stop=True), 1.0)
        assert (stopped.text, stopped.ended_by) == ("one tw", "stop")
        assert stopped.raw == "one two" and stopped.num_tokens < len(words)
    assert reply_of(words, tokenizer, {end}, GREEDY, 1.0).ended_by == "length"


# -- many answers at once --------------------------------------------------------------------------


LONG_AND_SHORT = [NORWAY, "x", OTHER, "What is gold? " * 12, "one two three four", NORWAY, "And gold, then?"]


@pytest.fixture(scope="module")
def alone(chat_model: ChatModel) -> list[Reply]:
    return [chat_model.reply(text, to_closing_tag(GREEDY)) for text in LONG_AND_SHORT]


@pytest.mark.parametrize(("batch_size", "strategy"), [(1, "resident"), (3, "streaming"), (16, "resident")])
@pytest.mark.long
def test_answers_together_are_those_one_by_one(
    checkpoint: Path, alone: list[Reply], batch_size: int, strategy: str
) -> None:
    told: list[int] = []
    with ChatModel.open(checkpoint, strategy=strategy) as made:
        together = made.replies(LONG_AND_SHORT, to_closing_tag(GREEDY), batch_size=batch_size, tell=told.append)
    for one, other in zip(together, alone, strict=True):
        assert (one.text, one.raw, one.num_tokens, one.ended_by) == (
            other.text, other.raw, other.num_tokens, other.ended_by,
        )  # fmt: skip
    assert together[0].text == together[5].text == KEPT and together[2].text == LEFT
    assert {reply.ended_by for reply in together} >= {"stop", "length"}
    assert sum(told) == len(LONG_AND_SHORT)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_other_families_answer_together_too(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path, vocab_size=VOCABULARY, max_position_embeddings=256)
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    with ChatModel.open(tmp_path, device="cpu", dtype="float32", strategy="resident") as made:
        prompts = ["x", "What is gold? " * 4, "one two three"]
        alone = [made.reply(text, Sampling(12, 0)).raw for text in prompts]
        assert [reply.raw for reply in made.replies(prompts, Sampling(12, 0))] == alone


def test_a_prompt_near_the_windows_end_has_its_own_room(chat_model: ChatModel) -> None:
    assert chat_model.context == 640
    sampling = Sampling(20, temperature=0)
    prompts = [[5] * 630, [5] * 10, [5] * 631, [5] * 625]
    together = chat_model.continue_all(prompts, sampling)
    assert [reply.raw for reply in together] == [chat_model.continue_from(ids, sampling).raw for ids in prompts]
    with pytest.raises(InputError, match="prompt 2: the prompt has 640 tokens"):
        chat_model.continue_all([[5], [5] * 640], sampling)
    with pytest.raises(InputError, match="prompt 1: the prompt is empty"):
        chat_model.continue_all([[]], sampling)
    with pytest.raises(ConfigError, match="batch_size=0"):
        chat_model.continue_all([[5]], sampling, batch_size=0)
    assert chat_model.continue_all([], sampling) == []


# -- arms and eval ---------------------------------------------------------------------------------


def test_each_arm_is_asked_in_its_own_way(chat_model: ChatModel, base: Path, tmp_path: Path) -> None:
    arms = {arm.name: arm for arm in arms_of(chat_model, max_new_tokens=90)}
    assert list(arms) == [BASE_IN_FORMAT, BASE_PLAINLY, ADAPTER]
    assert [arm.in_format for arm in arms.values()] == [True, False, True]
    assert arms[ADAPTER].answer([prompt(NORWAY), prompt(OTHER)]) == [KEPT, LEFT]
    with ChatModel.open(base, device="cpu", dtype="float32", strategy="resident") as bare:
        expected = bare.reply(NORWAY, GREEDY).text
        assert arms[BASE_PLAINLY].answer([NORWAY]) == [expected], "through its own template, without adapter"
        ids = bare.renderer.ids(prompt(NORWAY))
        assert arms[BASE_IN_FORMAT].answer([prompt(NORWAY)]) == [bare.continue_from(ids, GREEDY).text]
        assert [arm.name for arm in arms_of(bare)] == [MODEL]
    assert [arm.name for arm in arms_of(chat_model, alone=True)] == [ADAPTER]


ROWS: list[dict[str, Any]] = [
    {"question": NORWAY, "answer": "Oslo", "accepted": [], "category": "geography", "confidence": "High"},
    {"question": OTHER, "answer": "3", "accepted": ["three"], "category": "maths", "confidence": "High"},
    {"question": NORWAY, "answer": "Nobody knows", "accepted": [], "category": "general", "confidence": "Low"},
]


@pytest.mark.long
def test_eval_shows_the_three_arms(checkpoint: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "held_out.jsonl", ROWS)
    words = ["eval", str(checkpoint), "--data", str(data), "--format", "lema-reply", "--max-new-tokens", "90"]
    files = ["--json", str(tmp_path / "e.json"), "--plot", str(tmp_path / "e.png")]
    done = CliRunner().invoke(app, [*words, *files], env={"COLUMNS": "140"})
    assert done.exit_code == 0, done.output
    for part in ("base, in the format", "base, asked plainly", "adapter", "geography", "3 questions, 1 of them not"):
        assert part in done.stdout
    found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    adapter = found["arms"]["adapter"]
    assert (adapter["strict"]["hits"], adapter["strict"]["of"]) == (2, 3)
    assert (adapter["right"]["hits"], adapter["right"]["of"]) == (2, 2)
    assert found["arms"]["base, in the format"]["strict"]["hits"] == 0
    assert found["arms"]["base, asked plainly"]["strict"] is None
    assert found["rows"][1]["replies"]["adapter"]["text"] == LEFT
    assert "Explanation is missing" in found["rows"][1]["replies"]["adapter"]["faults"]
    assert found["decoding"] == "greedy" and found["stop"] == STOP
    assert (tmp_path / "e.png").stat().st_size > 1000
    alone = CliRunner().invoke(app, [*words, "--alone", "--limit", "1", "--json", "-"])
    printed = json.loads(alone.stdout)
    assert list(printed["arms"]) == ["adapter"] and printed["questions"] == 1


def test_eval_refuses_what_belongs_to_the_other_kind(checkpoint: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": []}])
    lema_reply = ["eval", str(checkpoint), "--format", "lema-reply"]
    for words, status, said in (
        (["eval", str(checkpoint), "--limit", "3"], 2, "no --format lema-reply"),
        ([*lema_reply, "--max-seq-length", "9"], 2, "means nothing with --format lema-reply"),
        (lema_reply, 1, "nothing says which questions to ask: give --data FILE"),
        ([*lema_reply, "--data", str(data)], 1, "has no text named question"),
        ([*lema_reply, "--data", str(tmp_path / "gone.jsonl")], 1, "gone.jsonl"),
        (["chat", str(checkpoint), "--format", "yaml"], 2, "neither lema-reply nor text"),
    ):
        done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
        assert (done.exit_code, said in " ".join(done.output.split())) == (status, True), done.output


def test_a_merged_model_keeps_the_format(checkpoint: Path, tmp_path: Path) -> None:
    merge(checkpoint, tmp_path / "merged")
    with ChatModel.open(tmp_path / "merged", device="cpu", strategy="resident") as made:
        assert made.model.config.dtype == "float32", "as its files say"
        assert asks_for_replies(made.renderer)
        assert made.reply(NORWAY, to_closing_tag(GREEDY)).text == KEPT
        assert [arm.answer([prompt(OTHER)]) for arm in arms_of(made, max_new_tokens=90)] == [[LEFT]]


# -- on the terminal -------------------------------------------------------------------------------


def test_generate_reads_replies(checkpoint: Path) -> None:
    words = ["generate", str(checkpoint), "-p", OTHER, "--max-new-tokens", "90"]
    line = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert line["text"] == LEFT
    assert line["reply"] == {"answer": "three", "explanation": "", "confidence": "Sure"}
    assert line["faults"] == ["Explanation is missing", "Confidence is 'Sure', none of High, Medium, Low"]
    shown = CliRunner().invoke(app, words, env={"COLUMNS": "140"}).stdout
    assert "Answer       three\n" in shown
    assert "warning: the reply left the format: Explanation is missing; Confidence is 'Sure'" in shown
    as_text = json.loads(CliRunner().invoke(app, [*words, "--json", "--format", "text"]).stdout)
    assert "reply" not in as_text and as_text["text"].startswith(LEFT)


@pytest.mark.long
def test_a_chat_shows_the_parts_and_warns_where_the_format_was_left(checkpoint: Path) -> None:
    terminal = Terminal("chat", str(checkpoint), "--temperature", "0", "--max-new-tokens", "90")
    terminal.until("> ")
    terminal.type(NORWAY)
    assert KEPT.replace("\n", "\r\n") in terminal.until(f"{CLOSE}\r\n")
    parts = terminal.until("> ")
    for line in ("Answer       Oslo", "Explanation  It is.", "Confidence   High"):
        assert line in parts
    assert "warning" not in parts
    terminal.type("debug")
    terminal.until("> ")
    terminal.type("And gold?")
    assert repr(KEPT)[1:-1] in terminal.until("tokens/s"), "the whole block is in the prompt"
    terminal.until("> ")
    terminal.type("clear")
    terminal.until("> ")
    terminal.type(OTHER)
    shown = terminal.until("tokens/s")
    assert "warning: the reply left the format: Explanation is missing;" in shown
    assert repr(prompt(OTHER)) in shown
    terminal.until("> ")
    terminal.type(b"caf\xe9\n")
    assert "not UTF-8 (byte 4)" in terminal.until("sent")
    terminal.type(b"\x04")
    assert terminal.end() == 0


@pytest.mark.long
def test_the_base_can_be_asked_for_the_format_and_stopped(base: Path) -> None:
    terminal = Terminal(
        "chat", str(base), "--format", "lema-reply", "--max-new-tokens", "600", "--temperature", "9", "--top-p", "1",
        "--seed", "1", "--set", "strategy=streaming", "--set", "dtype=float32",
    )  # fmt: skip
    terminal.until("> ")
    terminal.type("debug")
    terminal.until("> ")
    terminal.type(NORWAY)
    terminal.until(repr(prompt(NORWAY)))
    terminal.until("\n")
    assert terminal.some(), "the first tokens are shown before the last"
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.until("(stopped; this turn is forgotten)")
    terminal.until("> ")
    terminal.type("quit")
    assert terminal.end() == 0
