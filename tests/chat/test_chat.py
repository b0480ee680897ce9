"""Answers: what transformers would say, piece by piece, in turns that fit the window; and the verbs around them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from chat_models import save_base, save_learned
from data_helpers import CHATML, chat, make_tokenizer, write_jsonl
from lema.chat import ChatModel, Conversation, Sampling
from lema.cli.app import app
from lema.data.render import ChatRenderer
from lema.errors import ConfigError, InputError
from terminal import Terminal

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
QUESTION, ANSWER = "What is the capital of Norway?", "Oslo is the capital. [END] and more"
GREEDY = Sampling(max_new_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer."""
    return save_base(tmp_path_factory.mktemp("base"), positions=96)


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has learned one answer by heart."""
    return save_learned(base, tmp_path_factory.mktemp("run") / "final", [(QUESTION, ANSWER)], rank=16, loss=0.02)


@pytest.fixture(scope="module")
def chat_model(checkpoint: Path) -> Any:
    with ChatModel.open(checkpoint, strategy="resident") as made:
        yield made


def test_the_answer_is_the_one_transformers_gives(chat_model: ChatModel, base: Path, checkpoint: Path) -> None:
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(checkpoint))
    ids = chat_model.renderer.ask(QUESTION)
    made = plain.generate(input_ids=torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=2)
    expected = chat_model.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
    reply = chat_model.reply(QUESTION, GREEDY)
    assert reply.text == expected == ANSWER
    assert reply.ended_by == "end"
    assert reply.raw == ANSWER + "<|im_end|>"
    assert reply.num_tokens == made.shape[1] - len(ids)


@pytest.mark.parametrize("stop", [(), ("[END]",), ("capital. [",), ("zzz", " and", "more")])
def test_pieces_are_the_answer_and_hold_nothing_of_a_stop_text(chat_model: ChatModel, stop: tuple[str, ...]) -> None:
    pieces: list[str] = []
    reply = chat_model.reply(QUESTION, Sampling(24, 0, stop=stop), pieces.append)
    assert "".join(pieces) == reply.text
    cut = min((ANSWER.index(text) for text in stop if text in ANSWER), default=len(ANSWER))
    assert reply.text == ANSWER[:cut]
    assert reply.ended_by == ("stop" if cut < len(ANSWER) else "end")
    if not stop:
        assert len(pieces) > 2, "they come one by one"


def test_an_answer_that_is_cut_says_so(chat_model: ChatModel) -> None:
    reply = chat_model.reply(QUESTION, Sampling(3, 0))
    assert (reply.ended_by, reply.num_tokens) == ("length", 3)
    assert ANSWER.startswith(reply.text)


def test_the_same_seed_draws_the_same(checkpoint: Path) -> None:
    hot = Sampling(12, temperature=5.0, top_p=1.0)
    found = []
    with ChatModel.open(checkpoint, strategy="resident", adapter=False) as bare:
        assert bare.model.lora_manager is None
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(bare.reply(QUESTION, hot).raw)
    assert found[0] == found[1] != found[2]


def test_earlier_turns_are_in_the_prompt_and_the_oldest_go_first(chat_model: ChatModel) -> None:
    talk = Conversation(chat_model)
    talk.ask(QUESTION, GREEDY)
    assert [turn["content"] for turn in talk.turns] == [QUESTION, ANSWER]
    turns, talk = talk.turns, Conversation(chat_model, "Be brief.")
    talk.turns = turns
    prompt = talk.prompt("And gold?")
    for part in ("system\nBe brief.", QUESTION, ANSWER, "user\nAnd gold?<|im_end|>\n<|im_start|>assistant\n"):
        assert part in prompt
    assert chat_model.context == 96
    cut = talk.prompt("And gold?", room=50)
    assert talk.dropped == 2
    assert QUESTION not in cut
    assert "Be brief." in cut
    with pytest.raises(InputError, match=r"tokens with its template, and the model takes 96"):
        talk.prompt("gold " * 200)
    talk.clear()
    assert talk.turns == []
    assert QUESTION not in talk.prompt("And gold?")


def test_a_prompt_longer_than_the_model_takes_is_refused(chat_model: ChatModel) -> None:
    with pytest.raises(InputError, match="the model takes 96: shorten it"):
        chat_model.continue_from([5] * 96, GREEDY)
    assert chat_model.continue_from([5] * 95, GREEDY).num_tokens == 1
    with pytest.raises(InputError, match="the prompt is empty"):
        chat_model.continue_from([], GREEDY)


@pytest.mark.parametrize(
    "values", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 2}, {"stop": ("",)}]
)
def test_sampling_out_of_bounds_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Sampling(**values)


def test_a_plain_adapter_of_peft_opens_too(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    with ChatModel.open(tmp_path, base=str(base), device="cpu", dtype="float32") as made:
        assert made.reply(QUESTION, GREEDY).text == ANSWER
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="does not say which model it is for: name it with --base"):
        ChatModel.open(tmp_path, device="cpu")


def test_scaling_of_a_plain_adapter_is_its_own(base: Path, tmp_path: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    settings = LoraConfig(r=4, lora_alpha=32, use_rslora=True, target_modules="all-linear", alpha_pattern={"q_proj": 8})
    adapted = get_peft_model(plain, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with ChatModel.open(tmp_path, base=str(base), device="cpu", dtype="float32") as made, torch.no_grad():
        found = made.model.hf_model(input_ids=ids).logits
        torch.testing.assert_close(found, adapted.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_an_answer_ends_where_the_template_ends_a_turn(base: Path, tmp_path: Path) -> None:
    """Templates may end turns with another token than the model's own end."""
    other = CHATML.replace("<|im_end|>", "<|pad|>")
    tokenizer = make_tokenizer(other)
    end = tokenizer.convert_tokens_to_ids("<|pad|>")
    renderer = ChatRenderer(tokenizer)
    assert renderer.end_tokens == sorted({tokenizer.eos_token_id, end})
    assert ChatRenderer(make_tokenizer(None)).end_tokens == [tokenizer.eos_token_id]
    with ChatModel.open(base, device="cpu", dtype="float32") as made:
        chat_model = ChatModel(made.model, renderer)
        assert end in chat_model._end_tokens()


@pytest.mark.parametrize("ends", [[3, 7, 9], 7])
def test_answers_end_where_the_models_generation_config_says(base: Path, tmp_path: Path, ends: Any) -> None:
    """config.json names one end token; transformers takes those of generation_config.json instead."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    expected = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    with ChatModel.open(folder, device="cpu", dtype="float32") as made:
        module: Any = made.model.hf_model
        assert module.generation_config.eos_token_id == expected == ends
        assert made._end_tokens() >= {*(ends if isinstance(ends, list) else [ends])}
        ids = torch.tensor([made.renderer.ask("x")])
        first = int(made.model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, 3]}))
    with ChatModel.open(folder, device="cpu", dtype="float32") as made:
        assert made.reply("x", GREEDY).ended_by == "end"
        assert made.model.generate(ids, max_new_tokens=9, do_sample=False).shape[1] == ids.shape[1] + 1


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "</s>"}'])
def test_a_generation_config_that_says_nothing_useful_is_named(
    base: Path, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "generation_config.json").write_text(text)
    with ChatModel.open(folder, device="cpu", dtype="float32") as made:
        assert made.reply("x", Sampling(2, temperature=0)).num_tokens <= 2
    assert "generation_config.json" in caplog.text


# -- verbs -----------------------------------------------------------------------------------------


def test_generate_writes_answers(checkpoint: Path, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": QUESTION}, {"prompt": "x"}])
    done = CliRunner().invoke(
        app,
        ["generate", str(checkpoint), "--file", str(prompts), "--json", "--stop", "[END]", "--max-new-tokens", "24"],
    )
    assert done.exit_code == 0, done.output
    first = json.loads(done.stdout.splitlines()[0])
    assert first == {"prompt": QUESTION, "text": "Oslo is the capital. ", "ended_by": "stop", "tokens": first["tokens"]}
    shown = CliRunner().invoke(app, ["generate", str(checkpoint), "-p", QUESTION])
    assert shown.stdout == ANSWER + "\n"
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    bad = CliRunner().invoke(app, ["generate", str(checkpoint), "--file", str(tmp_path / "bad.jsonl")])
    assert bad.exit_code == 1
    assert "line 1 has no text named prompt" in bad.output


def test_eval_shows_base_and_adapter(checkpoint: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": chat(QUESTION, ANSWER)}] * 3)
    done = CliRunner().invoke(app, ["eval", str(checkpoint), "--data", str(data), "--json", "-"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["adapter"]["eval_loss"] < 0.05 < 3 < found["base"]["eval_loss"]
    assert found["adapter"]["eval_token_accuracy"] == 1.0
    assert found["adapter"]["eval_targets"] == found["base"]["eval_targets"] > 0
    plain = CliRunner().invoke(app, ["eval", str(checkpoint), "--data", str(data), "--alone"])
    assert re.search(r"token accuracy +100\.00%", plain.stdout)
    assert "base" not in plain.stdout
    run = tmp_path / "run" / "final"
    shutil.copytree(checkpoint, run)
    (run / "run.yaml").write_text(
        f"model_name_or_path: {checkpoint}\ntrain_file: nowhere.jsonl\neval_size: 0.1\nchat_template: gone.jinja\n"
    )
    again = CliRunner().invoke(app, ["eval", str(run), "--data", str(data), "--alone", "--json", "-"])
    assert json.loads(again.stdout)["adapter"]["eval_loss"] == found["adapter"]["eval_loss"], again.output
    nothing = CliRunner().invoke(app, ["eval", str(checkpoint)])
    assert nothing.exit_code == 1
    assert "give --data FILE" in nothing.output


@pytest.mark.long
def test_a_chat_in_a_terminal(checkpoint: Path) -> None:
    terminal = Terminal("chat", str(checkpoint), "--temperature", "0", "--max-new-tokens", "24")
    assert "with its adapter, float32 on cpu" in terminal.until("> ")
    terminal.type(QUESTION)
    assert ANSWER in terminal.until("\r\n> ")
    terminal.type("debug")
    terminal.until("debug is on\r\n> ")
    terminal.type("And gold?")
    seen = terminal.until("tokens/s")
    assert repr(ANSWER)[1:-1] in seen, "the first turn is in the prompt"
    terminal.until("> ")
    terminal.type("clear")
    terminal.until("forgotten")
    terminal.until("> ")
    terminal.type("And gold?")
    assert QUESTION not in terminal.until("tokens/s")
    terminal.until("> ")
    terminal.type(b"caf\xe9\n")
    assert "not UTF-8 (byte 4)" in terminal.until("sent")
    terminal.until("> ")
    terminal.type(" QUIT ")
    assert terminal.end() == 0


@pytest.mark.parametrize("how", ["end of file", "ctrl-c"])
@pytest.mark.long
def test_a_chat_ends_quietly(checkpoint: Path, how: str) -> None:
    terminal = Terminal("chat", str(checkpoint))
    terminal.until("> ")
    if how == "ctrl-c":
        os.killpg(terminal.process.pid, signal.SIGINT)
    else:
        terminal.type(b"\x04")
    assert terminal.end() == 0


@pytest.mark.long
def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(checkpoint: Path) -> None:
    terminal = Terminal(
        "chat", str(checkpoint), "--no-adapter", "--temperature", "9", "--top-p", "1", "--max-new-tokens", "80",
        "--set", "strategy=streaming",
    )  # fmt: skip
    terminal.until("> ")
    terminal.type("x")
    terminal.until("x\r\n")
    time.sleep(0.3)
    os.killpg(terminal.process.pid, signal.SIGINT)
    seen = terminal.until("> ")
    terminal.type("quit")
    assert terminal.end() == 0
    assert "Traceback" not in seen
