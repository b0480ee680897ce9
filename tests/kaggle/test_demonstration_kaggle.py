"""The original's commands for Kaggle: a notebook is built, pushed, watched and fetched."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from kaggle_server import TOKEN, Clock, KaggleServer, Kernel

SCRIPTS = Path(__file__).parents[2] / "demonstration" / "kaggle"
pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("kaggle")]


def run(monkeypatch: pytest.MonkeyPatch, script: str, *words: str) -> None:
    """One of the scripts, in this process, up to its end without an error."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert not ended.value.code


def test_build_push_monitor_and_retrieve(
    server: KaggleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(waits_for=server.changed)
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    monkeypatch.setattr("lema_kaggle.retry_policy.RetryPolicy", lambda **given: clock.retry_policy(say=given["say"]))
    monkeypatch.chdir(tmp_path)

    def executed(kernel: Kernel) -> None:
        kernel.log.append("trained\n")
        kernel.files = {"result.json": b'{"status": "finished"}'}

    server.runner = executed
    run(monkeypatch, "build_notebook.py")
    assert (tmp_path / "kaggle/llama2/lema-llama2.ipynb").is_file()
    run(monkeypatch, "build_notebook.py", "inference")
    assert (tmp_path / "kaggle/inference/kernel-metadata.json").is_file()
    run(monkeypatch, "push_to_kaggle.py")
    assert list(server.kernels) == ["alice/lema-llama-2-7b"]
    run(monkeypatch, "monitor_kernel.py", "alice/lema-llama-2-7b")
    run(monkeypatch, "retrieve_logs.py", "alice/lema-llama-2-7b", "-o", "fetched")
    assert "trained" in (tmp_path / "fetched" / "lema-llama-2-7b.log").read_text()
    assert (tmp_path / "fetched" / "result.json").is_file()
    assert "next: lema kaggle pull alice/lema-llama-2-7b" in capsys.readouterr().out
