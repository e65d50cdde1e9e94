"""Help, listing and completion never import torch; completion and listing not even Hydra."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

PROBE = """
import json, sys
from llmkit.cli import main
try:
    code = main({argv!r})
except SystemExit as end:
    code = end.code
names = {{module.partition(".")[0] for module in sys.modules}}
heavy = {{"torch", "transformers", "numpy", "matplotlib", "hydra", "omegaconf"}}
print("\\n" + json.dumps([code, sorted(names & heavy)]))
"""

LIGHT = [
    ["--help"],
    ["--version"],
    ["plugins"],
    ["plugins", "show", "continuous"],
    ["completion", "bash"],
    ["__complete", "llmkit run scheduler=priority scheduler."],
]


def imported(argv: list[str]) -> tuple[int, list[str]]:
    """Exit code of the command, and which heavy packages it imported."""
    done = subprocess.run([sys.executable, "-c", PROBE.format(argv=argv)], capture_output=True, text=True, check=True)
    code, names = json.loads(done.stdout.splitlines()[-1])
    return code, names


@pytest.mark.parametrize("argv", LIGHT, ids=" ".join)
def test_light_commands_import_nothing_heavy(argv: list[str]) -> None:
    assert imported(argv) == (0, [])


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["run", "--help"], 0),
        (["run", "--cfg", "job"], 0),
        (["run", "scheduler=nope"], 2),
        (["run", "scheduler.max_num_seqs=0", "hydra.run.dir=."], 2),
    ],
)
def test_run_validates_before_it_imports_torch(
    argv: list[str], code: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("light"))
    assert imported(argv) == (code, ["hydra", "omegaconf"])


def test_generate_validates_before_it_imports_torch() -> None:
    assert imported(["generate", "x", "--max-tokens", "0"]) == (2, [])
    assert imported(["generate", "x", "--model", "nope"]) == (2, [])


def test_vocabulary_is_light_until_it_is_used() -> None:
    probe = "import sys, llmkit; from llmkit import *; print('torch' in sys.modules)"
    light = "import sys, llmkit, llmkit.testing; print('torch' in sys.modules, 'hydra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", light], capture_output=True, text=True).stdout == "False False\n"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "True\n"


def test_the_version_is_that_of_the_distribution() -> None:
    command = [sys.executable, "-m", "llmkit", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"llmkit {version('llmkit')}\n"


@pytest.mark.parametrize("argv", [["plugins"], ["completion", "bash"], ["run", "--cfg", "job"], ["run", "--help"]])
def test_a_full_disk_is_one_line(argv: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llmkit", *argv], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
    says = "llmkit: cannot write standard output or a file of the run: No space left on device\n"
    assert (done.stderr, done.returncode) == (says, 2)
