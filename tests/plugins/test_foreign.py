"""The foreign distribution of docs/examples: built as its authors would, found, listed, tested, swept and run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "llmkit-lifo"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built into a wheel by its own build backend and unpacked as an installer does."""
    source, target = tmp_path_factory.mktemp("lifo") / "source", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(source / "dist")]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("llmkit_lifo-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "llmkit_lifo.py" in archive.namelist()
        archive.extractall(target)
    return target


def call(site: Path, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the example installed, in an empty folder."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "160"}
    return subprocess.run([sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True)


def test_listed_with_its_distribution(site: Path, tmp_path: Path) -> None:
    code = "import sys; from llmkit.cli import main; sys.exit(main(sys.argv[1:]))"
    listed = call(site, tmp_path, "-c", code, "plugins")
    assert listed.returncode == 0, listed.stderr
    (line,) = [line for line in listed.stdout.splitlines() if " lifo " in line]
    assert "scheduler" in line and "llmkit-lifo 1.0.0" in line and "The newest request first" in line
    shown = call(site, tmp_path, "-c", code, "plugins", "show", "lifo").stdout
    assert "scheduler.patience" in shown and "number, above 0.0" in shown and "30.0" in shown


def test_in_help_and_errors(site: Path, tmp_path: Path) -> None:
    text = call(site, tmp_path, "-m", "llmkit.run", "--help").stdout
    assert "scheduler: continuous, deadline, fair, lifo, prefix_aware, priority, sequential, sjf, static" in text
    wrong = call(site, tmp_path, "-m", "llmkit.run", "scheduler=lifo", "scheduler.patience=-1")
    assert wrong.returncode == 2
    assert "scheduler.patience=-1: " in wrong.stderr and "(allowed: number, above 0.0)" in wrong.stderr
    assert "did you mean 'lifo'?" in call(site, tmp_path, "-m", "llmkit.run", "scheduler=lfo").stderr


def test_its_own_tests_pass(site: Path, tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "test_lifo.py", tmp_path)
    done = call(site, tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_lifo.py")
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_swept_beside_the_built_ins_on_a_real_model(site: Path, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "models")
    workload = ["workload=batch", "workload.num_requests=4", "workload.prompt_len=4", "workload.max_tokens=[2,6]"]
    argv = ["-m", "scheduler=continuous,lifo", "scheduler.max_num_seqs=2", "model=tiny", *workload]
    both = Path(os.pathsep.join([str(site), str(tmp_path / "models")]))
    done = call(both, tmp_path, "-m", "llmkit.run", *argv)
    assert done.returncode == 0, done.stderr
    results = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("result.json")}
    assert set(results) == {"0-continuous-paged-tiny-batch", "1-lifo-paged-tiny-batch"}
    assert all(result["completed"] == 4 and result["failed"] == 0 for result in results.values())
