"""Kaggle by the official client against a local server: credentials, push, status, logs, pull, and every fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kaggle_server import KEY, TOKEN, USER, Clock, KaggleServer
from lema.cli.app import app
from lema.errors import KaggleError
from lema_kaggle import credentials, download, watch
from lema_kaggle.client import Kernels, save_request
from lema_kaggle.credentials import Credentials, find
from lema_kaggle.folder import Order, build, next_title, read
from lema_kaggle.metadata import metadata
from lema_kaggle.notebook import parameters_of
from lema_kaggle.retry_policy import RetryPolicy

pytestmark = pytest.mark.xdist_group("kaggle")  # one port
REF = "alice/lema-proof"
OUTPUTS = {"adapter/adapter_config.json": b"{}", "adapter/adapter_model.safetensors": bytes(range(256)) * 4096,
           "eval.json": b"[]", "metrics.jsonl": b""}  # fmt: skip


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kernels(server: KaggleServer, clock: Clock) -> Kernels:
    return Kernels(Credentials("a test", USER, key=KEY), clock.retry_policy())


def cli(monkeypatch: pytest.MonkeyPatch, clock: Clock, *words: str, token: str = TOKEN) -> Any:
    """The verb in this process, by the clock, with a token."""
    monkeypatch.setenv("KAGGLE_API_TOKEN", token)
    monkeypatch.setattr("lema_kaggle.retry_policy.RetryPolicy", lambda **given: clock.retry_policy(say=given["say"]))
    return CliRunner().invoke(app, ["kaggle", *words])


# -- credentials -----------------------------------------------------------------------------------


def secret(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_credentials_come_from_each_place_in_the_clients_order(tmp_path: Path) -> None:
    secret(tmp_path / ".kaggle/kaggle.json", json.dumps({"username": "carol", "key": "k3"}))
    assert find({}, tmp_path) == Credentials(str(tmp_path / ".kaggle/kaggle.json"), "carol", key="k3")
    env = {"KAGGLE_USERNAME": "bob", "KAGGLE_KEY": "k2"}
    assert (find(env, tmp_path).user, find(env, tmp_path).key) == ("bob", "k2")
    secret(tmp_path / ".kaggle/access_token", "tok1\n")
    assert find(env, tmp_path).token == "tok1"
    assert find({**env, "KAGGLE_API_TOKEN": "tok0"}, tmp_path).token == "tok0"
    there = str(secret(tmp_path / "elsewhere", "tok9"))
    assert find({"KAGGLE_API_TOKEN": there}, tmp_path).token == "tok9"
    assert "tok0" not in repr(find({"KAGGLE_API_TOKEN": "tok0"}, tmp_path))


def test_credentials_in_the_places_of_xdg_and_of_the_config_dir(tmp_path: Path) -> None:
    text = json.dumps({"username": "carol", "key": "k3"})
    secret(tmp_path / ".config/kaggle/kaggle.json", text)
    assert find({}, tmp_path).user == "carol"
    secret(tmp_path / "own/kaggle.json", text.replace("carol", "dave"))
    assert find({"KAGGLE_CONFIG_DIR": str(tmp_path / "own")}, tmp_path).user == "dave"


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "no Kaggle credentials"),
        ({"KAGGLE_USERNAME": "bob"}, "without KAGGLE_KEY"),
        ({"KAGGLE_KEY": "k"}, "without KAGGLE_USERNAME"),
        ({"KAGGLE_USERNAME": "your-username", "KAGGLE_KEY": "k"}, "is no Kaggle user name"),
    ],
)
def test_missing_credentials_are_explained(tmp_path: Path, env: dict[str, str], said: str) -> None:
    with pytest.raises(KaggleError, match=said):
        find(env, tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "mode", "said"),
    [
        ("kaggle.json", '{"username": "carol", "key": "k"}', 0o644, r"mode 644.*chmod 600"),
        ("access_token", "tok", 0o640, r"mode 640.*chmod 600"),
        ("access_token", " \n", 0o600, "is empty"),
        ("kaggle.json", "{", 0o600, "is not JSON"),
        ("kaggle.json", '{"username": "carol"}', 0o600, "must be"),
        ("kaggle.json", '{"username": "INSERT_SLUG_HERE", "key": "k"}', 0o600, "no Kaggle user name"),
    ],
)
def test_unusable_credential_files_are_explained(tmp_path: Path, name: str, text: str, mode: int, said: str) -> None:
    secret(tmp_path / ".kaggle" / name, text, mode)
    with pytest.raises(KaggleError, match=said):
        find({}, tmp_path)


def test_the_user_name_of_a_token_is_asked_for_once(server: KaggleServer, clock: Clock) -> None:
    own = Kernels(Credentials("a test", None, token=TOKEN), clock.retry_policy())
    assert own.ref("lema-proof") == REF and own.ref("bob/other") == "bob/other"
    assert server.calls == ["IntrospectToken"]


def test_a_token_kaggle_does_not_know_is_said_to_be_so(server: KaggleServer, clock: Clock) -> None:
    with pytest.raises(KaggleError, match=r"HTTP 401.*the credentials of a test are not accepted"):
        _ = Kernels(Credentials("a test", None, token="old"), clock.retry_policy()).user


# -- push ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("proof")
    build(Order("proof", USER), where)
    return where


def test_push_sends_what_the_official_push_sends(server: KaggleServer, kernels: Kernels, folder: Path) -> None:
    described, source, _ = read(folder)
    pushed = kernels.push(described, source)
    assert (pushed.ref, pushed.version) == (REF, 1)
    script = (  # its client knows no TEST environment, the SDK below it does
        "import sys, types\nsys.modules.setdefault('six', types.ModuleType('six'))\n"  # kaggle 2.2 forgot it
        "from kaggle.api.kaggle_api_extended import KaggleApi\nfrom kagglesdk import KaggleClient\n"
        "KaggleApi.build_kaggle_client = lambda self: KaggleClient(username=sys.argv[2], password=sys.argv[3])\n"
        "api = KaggleApi()\napi.authenticate()\napi.kernels_push(sys.argv[1])\n"
    )
    env = {**os.environ, "KAGGLE_USERNAME": USER, "KAGGLE_KEY": KEY}
    subprocess.run([sys.executable, "-c", script, str(folder), USER, KEY], check=True, env=env)
    ours, theirs = server.kernels[REF].versions
    assert json.loads(ours.pop("text"))["cells"] == json.loads(theirs.pop("text"))["cells"]
    assert ours == theirs
    assert ours["enableInternet"] is True and ours["machineShape"] == "NvidiaTeslaT4" and ours["isPrivate"] is True


def test_every_key_of_the_metadata_is_set(folder: Path) -> None:
    described, _, seconds = read(folder)
    assert set(described) == {
        "id", "title", "code_file", "language", "kernel_type", "is_private", "enable_gpu", "enable_tpu",
        "enable_internet", "machine_shape", "dataset_sources", "competition_sources", "kernel_sources",
        "model_sources", "keywords", "docker_image", "docker_image_pinning_type",
    }  # fmt: skip
    assert described["id"] == REF and seconds == 3 * 3600
    assert save_request(described, "{}", seconds).session_timeout_seconds == 3 * 3600
    on_cpu = metadata(USER, "LEMA proof", "x.ipynb", accelerator="none")
    assert on_cpu["enable_gpu"] is False and on_cpu["machine_shape"] is None


def test_an_answer_lost_after_it_arrived_does_not_push_twice(
    server: KaggleServer, kernels: Kernels, folder: Path
) -> None:
    server.faults["SaveKernel"] = ["lost"]
    assert kernels.push(*read(folder)).version == 1
    assert server.calls.count("SaveKernel") == 1 and len(server.kernels[REF].versions) == 1


def test_where_kaggle_does_not_say_what_arrived_nothing_is_pushed_again(
    server: KaggleServer, kernels: Kernels, folder: Path
) -> None:
    server.kernel(REF)
    server.without_versions = True
    server.faults["SaveKernel"] = ["lost"]
    with pytest.raises(KaggleError, match="does not say whether it arrived"):
        kernels.push(*read(folder))
    assert server.calls.count("SaveKernel") == 1


def test_an_answer_of_somebody_else_is_said_to_be_one(server: KaggleServer, kernels: Kernels) -> None:
    server.faults["GetKernelSessionStatus"] = ["page"]
    with pytest.raises(KaggleError, match="not one of Kaggle's API"):
        kernels.status(REF)


@pytest.mark.parametrize("fault", ["drop", 500, (429, 7), 503])
def test_a_push_that_did_not_arrive_is_sent_again(
    server: KaggleServer, kernels: Kernels, clock: Clock, folder: Path, fault: Any
) -> None:
    server.faults["SaveKernel"] = [fault, fault]
    assert kernels.push(*read(folder)).version == 1
    assert server.calls.count("SaveKernel") == 3 and len(server.kernels[REF].versions) == 1
    if isinstance(fault, tuple):
        assert clock.slept == [7.0, 7.0]  # as it was asked to


@pytest.mark.parametrize(
    ("fault", "said"), [(401, "not accepted"), (403, "phone number"), (404, "check the name"), (400, "HTTP 400")]
)
def test_a_refused_push_is_sent_once_and_explained(
    server: KaggleServer, kernels: Kernels, folder: Path, fault: int, said: str
) -> None:
    server.faults["SaveKernel"] = [fault]
    with pytest.raises(KaggleError, match=said):
        kernels.push(*read(folder))
    assert server.calls.count("SaveKernel") == 1


def test_kaggle_saying_no_in_its_answer_is_an_error(server: KaggleServer, kernels: Kernels, folder: Path) -> None:
    server.push_error = "Maximum batch GPU session count of 2 reached."
    with pytest.raises(KaggleError, match=r"session count of 2 reached.*wait"):
        kernels.push(*read(folder))


def test_a_source_that_does_not_exist_is_an_error(server: KaggleServer, kernels: Kernels, tmp_path: Path) -> None:
    build(Order("proof", USER, resume_from="alice/lema-proof"), tmp_path)
    with pytest.raises(KaggleError, match=r"without these sources.*alice/lema-proof"):
        kernels.push(*read(tmp_path))


def test_no_push_where_no_gpu_time_is_left(
    server: KaggleServer, clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.quota = (108001, 108000)
    said = cli(monkeypatch, clock, "push", str(folder))
    assert said.exit_code == 1 and "0.0 of 30 hours, more on 2026-11-28 00:00 UTC" in said.stderr
    assert "SaveKernel" not in server.calls
    assert cli(monkeypatch, clock, "push", str(folder), "--accelerator", "none").exit_code == 0
    sent = server.kernels[REF].versions[0]
    assert sent["enableGpu"] is False and "machineShape" not in sent


# -- status ----------------------------------------------------------------------------------------


def test_status_is_asked_less_and_less_often(server: KaggleServer, kernels: Kernels, clock: Clock) -> None:
    server.kernel(REF, states=["QUEUED", *["RUNNING"] * 12, "COMPLETE"])
    said: list[str] = []
    assert watch.wait_for_end(kernels, REF, say=said.append).state == "COMPLETE"
    assert clock.slept[:3] == [5.0, 5.0, 7.5] and clock.slept == sorted(clock.slept) and max(clock.slept) == 60.0
    assert [line.split(": ")[1].split(" after")[0] for line in said] == ["queued", "running", "complete"]


def test_right_after_a_push_the_end_of_the_run_before_does_not_count(
    server: KaggleServer, kernels: Kernels, clock: Clock
) -> None:
    server.kernel(REF, states=["COMPLETE", "COMPLETE", "RUNNING", "ERROR"])
    assert watch.wait_for_end(kernels, REF, pushed=True, say=clock.said.append).state == "ERROR"
    server.kernel(REF, states=["COMPLETE"])
    began = clock.seconds
    assert watch.wait_for_end(kernels, REF, pushed=True, say=clock.said.append).state == "COMPLETE"
    assert clock.seconds - began >= watch.SETTLE


def test_a_status_that_fails_for_a_while_does_not_end_the_wait(
    server: KaggleServer, kernels: Kernels, clock: Clock
) -> None:
    server.kernel(REF, states=["RUNNING", "COMPLETE"])
    server.faults["GetKernelSessionStatus"] = [500, "drop", (429, 11), 502, 503, 504, "drop", 500]
    assert watch.wait_for_end(kernels, REF, say=clock.said.append).state == "COMPLETE"
    assert 11.0 in clock.slept and any("HTTP 500" in line for line in clock.said)


def test_a_status_that_never_comes_is_explained(server: KaggleServer, kernels: Kernels, clock: Clock) -> None:
    server.faults["GetKernelSessionStatus"] = ["drop"] * 99
    with pytest.raises(KaggleError, match=r"no answer from Kaggle.*what was done so far is kept"):
        kernels.status(REF)
    assert clock.slept == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_a_slow_answer_times_out_and_is_asked_for_again(
    server: KaggleServer, kernels: Kernels, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.kernel(REF, states=["COMPLETE"])
    monkeypatch.setattr("lema_kaggle.transport.TIMEOUT", (1.0, 0.05))
    release, before = server.changed, KaggleServer.get_request
    slow = iter([True])

    def late(self: KaggleServer) -> Any:
        request = before(self)
        if next(slow, False):
            release.wait(10)
        return request

    monkeypatch.setattr(KaggleServer, "get_request", late)
    monkeypatch.setattr(clock, "sleep", lambda seconds: (clock.slept.append(seconds), release.set()))
    own = Kernels(kernels.credentials, clock.retry_policy())
    assert own.status(REF).state == "COMPLETE"
    assert clock.slept and any("ReadTimeout" in line for line in clock.said)


@pytest.mark.parametrize("tries", [1, 3])
def test_a_server_that_asks_for_hours_is_not_waited_for(server: KaggleServer, clock: Clock, tries: int) -> None:
    server.faults["GetKernelSessionStatus"] = [(429, 7200)] * 3
    with pytest.raises(KaggleError, match=r"HTTP 429.*too many requests"):
        Kernels(Credentials("a test", USER, key=KEY), clock.retry_policy(tries=tries)).status(REF)
    assert clock.slept == []


@pytest.mark.parametrize(
    ("state", "failure", "said"),
    [
        (
            "ERROR",
            "Your notebook raised",
            r"failed: Your notebook raised. The end of its log:\n  one\n  ValueError: two",
        ),
        ("ERROR", None, r"failed. The end of its log:(\n.*)+lema kaggle pull alice/lema-proof --any-state"),
        ("ERROR", "You exceeded your GPU quota", r"want of accelerator quota.*--resume-from alice/lema-proof"),
        ("CANCEL_ACKNOWLEDGED", None, r"was cancelled; a cancelled run may leave no outputs"),
    ],
)
def test_a_kernel_that_did_not_end_well_says_why(
    server: KaggleServer, clock: Clock, monkeypatch: pytest.MonkeyPatch, state: str, failure: str | None, said: str
) -> None:
    import re

    server.kernel(REF, states=["RUNNING", state], failure=failure, log=["one\n", "ValueError: two\n"])
    result = cli(monkeypatch, clock, "status", REF)
    assert result.exit_code == 1 and re.search(said, result.stderr), result.output


def test_status_once_and_quota(server: KaggleServer, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    server.kernel(REF, states=["RUNNING"])
    said = cli(monkeypatch, clock, "status", "lema-proof", "--once", "--quota")
    assert said.exit_code == 0 and said.stdout.splitlines() == [
        "GPU time left this week: 29.0 of 30 hours, more on 2026-11-28 00:00 UTC", "alice/lema-proof: running",
    ]  # fmt: skip
    assert "HTTP 403" in cli(monkeypatch, clock, "status", "bob/not-mine").stderr
    server.quota = None
    assert "does not say" in cli(monkeypatch, clock, "status", "--quota").stdout


# -- logs ------------------------------------------------------------------------------------------


def test_a_log_that_breaks_off_is_taken_up_where_it_was(server: KaggleServer, kernels: Kernels, clock: Clock) -> None:
    lines = [f"line {i}\n" for i in range(6)]
    server.kernel(REF, states=["QUEUED", "RUNNING", "COMPLETE"], log=lines)
    server.faults["logs"] = [404, ("cut", 2), "drop", ("cut", 4), 500]
    written: list[str] = []
    assert watch.follow_log(kernels, REF, written.append).state == "COMPLETE"
    assert written == lines


def test_a_log_that_never_goes_on_is_an_error(server: KaggleServer, kernels: Kernels) -> None:
    server.kernel(REF, states=["RUNNING"], log=["a\n"])
    server.faults["logs"] = ["drop"] * 50
    with pytest.raises(KaggleError, match=r"log of alice/lema-proof: no answer"):
        watch.follow_log(kernels, REF, lambda _: None)


def test_a_log_in_which_nothing_happens_for_a_while_is_no_fault(
    server: KaggleServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"line {i}\n" for i in range(6)]
    server.kernel(REF, states=["RUNNING"] * 9 + ["COMPLETE"], log=lines)
    monkeypatch.setattr("lema_kaggle.transport.TIMEOUT", (5.0, 0.1))
    own = Kernels(Credentials("a test", USER, key=KEY), clock.retry_policy(tries=2))
    server.faults["logs"] = [("silent", 2)] * 8
    written: list[str] = []
    assert watch.follow_log(own, REF, written.append).state == "COMPLETE"
    assert written == lines


def test_the_log_of_the_run_before_is_not_followed(
    server: KaggleServer, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = server.kernel(
        "alice/lema-inference", states=["COMPLETE", "COMPLETE", "RUNNING", "COMPLETE"], files=OUTPUTS
    )
    done = cli(monkeypatch, clock, "run", "inference", "--follow", "-o", str(tmp_path))
    assert done.exit_code == 0, done.output
    asked = server.calls[server.calls.index("SaveKernel") + 1 :]
    assert asked[:4] == ["GetKernelSessionStatus"] * 3 + ["logs"] and len(kernel.versions) == 2


def test_logs_of_an_ended_kernel(server: KaggleServer, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    server.kernel(REF, log=["one\n", "zwölf\n"])
    assert cli(monkeypatch, clock, "logs", "lema-proof").stdout == "one\nzwölf\n"
    assert cli(monkeypatch, clock, "logs", REF, "--follow").stdout == "one\nzwölf\n"


# -- pull ------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that does not come whole is lost; these are small enough to see what is kept."""
    monkeypatch.setattr(download, "_CHUNK", 1000)


def on_disk(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_pull_fetches_all_pages_and_the_log(
    server: KaggleServer, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.kernel(REF, log=["done\n"], files=OUTPUTS)
    said = cli(monkeypatch, clock, "pull", REF, "-o", str(tmp_path / "out"))
    assert said.exit_code == 0 and "lema chat" in said.stdout
    found = on_disk(tmp_path / "out")
    assert found.pop(download.RECORD) and found == {**OUTPUTS, "lema-proof.log": b"done\n"}


@pytest.mark.usefixtures("small_chunks")
def test_a_download_that_is_cut_goes_on_where_it_was(server: KaggleServer, kernels: Kernels, tmp_path: Path) -> None:
    server.kernel(REF, files={"a.bin": OUTPUTS["adapter/adapter_model.safetensors"]})
    server.faults["file"] = [("cut", 100_000), "drop", ("cut", 50_000), 503]
    download.pull(kernels, REF, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == OUTPUTS["adapter/adapter_model.safetensors"]
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]


@pytest.mark.usefixtures("small_chunks")
def test_a_pull_that_gave_up_goes_on_when_called_again(server: KaggleServer, kernels: Kernels, tmp_path: Path) -> None:
    server.kernel(REF, files={"a.bin": b"x" * 5000, "b.bin": b"y" * 10})
    server.faults["file"] = [("cut", 3000), *["drop"] * 5]
    with pytest.raises(KaggleError, match=r"fetching a.bin: no answer"):
        download.pull(kernels, REF, tmp_path)
    assert not (tmp_path / "a.bin").exists()  # nothing half in its place
    said: list[str] = []
    download.pull(kernels, REF, tmp_path, say=said.append)
    assert server.ranges[-2:] == ["bytes=3000-", None] and (tmp_path / "a.bin").read_bytes() == b"x" * 5000
    download.pull(kernels, REF, tmp_path, say=said.append)
    assert said[-2:] == ["a.bin: 5,000 bytes, was here already", "b.bin: 10 bytes, was here already"]


@pytest.mark.usefixtures("small_chunks")
def test_bytes_of_two_versions_are_never_put_together(server: KaggleServer, kernels: Kernels, tmp_path: Path) -> None:
    kernel = server.kernel(REF, files={"a.bin": b"x" * 5000})
    server.faults["file"] = [("cut", 3000), *["drop"] * 5]
    with pytest.raises(KaggleError):
        download.pull(kernels, REF, tmp_path)
    kernel.files["a.bin"] = b"z" * 5000
    download.pull(kernels, REF, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"z" * 5000


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("cut", [3000, 10])
def test_a_new_version_of_a_file_replaces_one_of_the_same_size_also_after_a_break(
    server: KaggleServer, kernels: Kernels, tmp_path: Path, cut: int
) -> None:
    kernel = server.kernel(REF, files={"a.bin": b"x" * 5000})
    download.pull(kernels, REF, tmp_path)
    kernel.files["a.bin"] = b"z" * 5000
    server.faults["file"] = [("cut", cut)]
    download.pull(kernels, REF, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"z" * 5000


@pytest.mark.usefixtures("small_chunks")
def test_a_server_without_ranges_is_fetched_from_anew(server: KaggleServer, kernels: Kernels, tmp_path: Path) -> None:
    server.without_ranges = True
    server.kernel(REF, files={"a.bin": b"x" * 5000})
    server.faults["file"] = [("cut", 3000)]
    download.pull(kernels, REF, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"x" * 5000


def test_more_here_than_there_is_begun_anew(server: KaggleServer, kernels: Kernels, tmp_path: Path) -> None:
    server.kernel(REF, files={"a.bin": b"x" * 50})
    server.faults["file"] = [("cut", 20), *["drop"] * 5]
    with pytest.raises(KaggleError):
        download.pull(kernels, REF, tmp_path)
    (tmp_path / "a.bin.part").write_bytes(b"q" * 99)
    download.pull(kernels, REF, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"x" * 50


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\..\\evil"])
def test_names_that_lead_out_of_the_folder_are_refused(
    server: KaggleServer, kernels: Kernels, tmp_path: Path, name: str
) -> None:
    server.kernel(REF, files={"fine": b"1", name: b"2"})
    with pytest.raises(KaggleError, match="outside of"):
        download.pull(kernels, REF, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_some_files(server: KaggleServer, kernels: Kernels, tmp_path: Path) -> None:
    server.kernel(REF, files=OUTPUTS, log=["x"])
    download.pull(kernels, REF, tmp_path, only=r"^adapter/")
    assert {n for n in on_disk(tmp_path) if n != download.RECORD} == {n for n in OUTPUTS if n.startswith("adapter/")}
    with pytest.raises(KaggleError, match="none of its 4 files matches"):
        download.pull(kernels, REF, tmp_path, only="nothing")
    with pytest.raises(KaggleError, match="no regular expression"):
        download.pull(kernels, REF, tmp_path, only="(")


def test_nothing_is_pulled_of_a_kernel_that_runs_or_failed_unless_asked_for(
    server: KaggleServer, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.kernel(REF, states=["RUNNING"], files={"a": b"1"})
    refused = cli(monkeypatch, clock, "pull", REF, "-o", str(tmp_path / "o"))
    assert refused.exit_code == 1 and "has not ended" in refused.stderr
    assert cli(monkeypatch, clock, "pull", REF, "-o", str(tmp_path / "o"), "--any-state").exit_code == 0
    assert (tmp_path / "o/a").read_bytes() == b"1"


# -- without a server ------------------------------------------------------------------------------


def test_retry_after_as_a_date() -> None:
    import requests

    from lema_kaggle.retry_policy import retry_after

    response = requests.Response()
    response.headers["Retry-After"] = "Wed, 21 Oct 2026 07:28:30 GMT"
    assert retry_after(response, 1792567680.0) == 30.0
    response.headers["Retry-After"] = "soon"
    assert retry_after(response, 0.0) is None


def test_waits_double_up_to_the_longest() -> None:
    assert [RetryPolicy().wait(attempt) for attempt in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_the_next_kernel_has_a_name_of_its_own() -> None:
    assert next_title("LEMA proof", "alice/lema-proof") == "LEMA proof 2"
    assert next_title("LEMA proof", "alice/lema-proof-2") == "LEMA proof 3"


def test_without_the_extra_the_error_names_it(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['kagglesdk'] = None\nfrom lema.cli.app import app\n"
        "app(['kaggle', 'status', 'alice/lema-proof'])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert (
        ended.returncode == 1
        and "pip install 'kaggle>=2.2.4' 'nbformat>=5.10' 'requests>=2.32'" in ended.stderr
        and "Traceback" not in ended.stderr
    )


def test_the_official_package_is_never_imported(server: KaggleServer, tmp_path: Path) -> None:
    """Importing it asks the network with whatever credentials it finds."""
    script = (
        "import sys\nfrom lema_kaggle.client import Kernels\nfrom lema_kaggle.credentials import Credentials\n"
        f"print(Kernels(Credentials('t', None, token={TOKEN!r})).user, 'kaggle' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [USER, "False"]


def test_a_folder_built_for_somebody_else_is_not_pushed(
    server: KaggleServer, clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = cli(monkeypatch, clock, "push", str(folder), "--user", "bob")
    assert refused.exit_code == 1 and "build it again with --user bob" in refused.stderr.replace("\n", " ")
    assert "SaveKernel" not in server.calls


def test_parameters_keep_the_types_of_the_notebook(
    server: KaggleServer, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"TOKENS": "128", "STEPS": "3", "HOURS": "2"}
    words = [word for name, value in given.items() for word in ("--set", f"{name.lower()}={value}")]
    assert cli(monkeypatch, clock, "build", "benchmark", "-o", str(tmp_path), *words).exit_code == 0
    written = parameters_of((tmp_path / "lema-benchmark.ipynb").read_text())
    assert {name: written[name] for name in given} == {"TOKENS": "'128'", "STEPS": "3", "HOURS": "2.0"}
    assert read(tmp_path)[2] == 3 * 3600


def test_user_names_from_the_command_line_are_checked() -> None:
    with pytest.raises(KaggleError, match="no Kaggle user name"):
        credentials.check_user("a b", "--user")


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (Order("nothing", USER), "choose one of proof"),
        (Order("proof", USER, hours=12.0), "at most 11"),
        (Order("proof", USER, title="abc"), "5 to 50 characters"),
        (Order("proof", USER, kernels=["not a source"]), "must be OWNER/SLUG"),
        (Order("inference", USER, resume_from="a/bcdef"), "trains nothing"),
        (Order("proof", USER, parameters={"COLOUR": 1}), "no parameter COLOUR"),
        (Order("proof", "your_username"), "no Kaggle user name"),
        (Order("proof", USER, parameters={"HOURS": "20"}), "at most 11"),
        (Order("proof", USER, parameters={"HOURS": "long"}), "HOURS=long must be a number"),
        (Order("proof", USER, parameters={"ROWS": "many"}), "ROWS=many must be a whole number"),
        (Order("inference", USER, parameters={"COMPARE": "perhaps"}), "COMPARE=perhaps must be true or false"),
        (Order("proof", USER, accelerator="TpuV6E8"), "computes on NVIDIA cards"),
        (Order("proof", USER, title="LEMA proof", resume_from=REF), "cannot take its own outputs"),
    ],
)
def test_orders_kaggle_would_refuse(tmp_path: Path, order: Order, said: str) -> None:
    with pytest.raises(KaggleError, match=said):
        build(order, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_build_did_not_make_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KaggleError, match="is missing: lema kaggle build"):
        read(tmp_path)
    build(Order("proof", USER), tmp_path)
    path = tmp_path / "kernel-metadata.json"
    described = json.loads(path.read_text())
    del described["enable_internet"]
    path.write_text(json.dumps(described))
    with pytest.raises(KaggleError, match="enable_internet missing"):
        read(tmp_path)
