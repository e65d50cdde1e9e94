"""Ctrl-C at any time is one line that says where the results are, if there are any."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from llmkit.cli import main as llmkit_main
from llmkit.run import main

Install = Callable[..., Path]

WATCHER = """
from pathlib import Path
from llmkit import hookimpl

finished = []

@hookimpl
def llmkit_request_finished(event):
    finished.append(event)
    if len(finished) > 8:  # more than the workload's warm-up
        Path("requests_finished").touch()
"""


def test_ctrl_c_keeps_what_was_measured(tiny_model: Path, install: Install, workdir: Path) -> None:
    site = install("foreign_watcher", WATCHER, "llmkit-watcher")
    argv = ["model=tiny", "workload=poisson", "workload.num_requests=4000", "scheduler.max_num_seqs=4"]
    command = [sys.executable, "-m", "llmkit.run", *argv]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (workdir / "requests_finished").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    (run,) = (workdir / "outputs").glob("*/*")
    assert f"what was measured so far is in {run.relative_to(workdir)}\n" in err
    result = json.loads((run / "result.json").read_text())
    assert 0 < result["completed"] < 4000
    assert len((run / "requests.jsonl").read_text().splitlines()) >= result["completed"]


class Impatience:
    """An import hook: Ctrl-C while `name` is imported."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if name == self.name:
            raise KeyboardInterrupt
        return None


@pytest.mark.parametrize("entry", [main, lambda argv: llmkit_main(["run", *argv])])
@pytest.mark.parametrize("module", ["llmkit.runner", "llmkit.workload.served"])
def test_ctrl_c_during_imports(
    tiny_model: Path,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    entry: Callable[[list[str]], int],
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Impatience(module), *sys.meta_path])
    assert entry(["model=tiny", "workload=batch"]) == 130
    err = capsys.readouterr().err
    assert err.startswith("llmkit: interrupted before any") and err.count("\n") == 1


def test_nothing_heavy_is_imported_before_ctrl_c_is_caught() -> None:
    heavy = {"hydra", "rich", "numpy", "torch", "matplotlib"}
    code = f"import llmkit.run, llmkit.cli, sys; print(*({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "llmkit.run", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", ["plugins", "--help", "run --help"])
def test_an_output_that_is_closed_from_the_start_is_no_error(words: str) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m llmkit {words} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_torch_says_nothing_when_a_run_ends_early(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while it is imported, it would log at the end how the cache of its fake tensors did."""
    code = "import sys, llmkit.run as r; r.main(['scheduler.max_num_seqs=0']); import logging\n"
    code += "print(logging.getLogger('torch._subclasses.fake_tensor').isEnabledFor(logging.INFO))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_ctrl_c_while_the_model_loads_names_the_run_folder(
    tiny_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def impatient(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmkit.llm.load_model", impatient)
    assert main(["model=tiny", "workload=batch"]) == 130
    (folder,) = (workdir / "outputs").glob("*/*")
    said = f"llmkit: interrupted before anything was measured; run folder: {folder.relative_to(workdir)}\n"
    assert capsys.readouterr().err == said
