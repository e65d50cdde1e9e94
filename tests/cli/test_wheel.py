"""llmkit's own wheel: it carries `conf/`, its plugins and its entry points, and runs without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built here and unpacked as an installer does."""
    folder, target = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("llmkit-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def call(site: Path, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the wheel's contents before everything else."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True)


def test_top_level_packages(site: Path) -> None:
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"llmkit", "llmkit_attention", "llmkit_caches", "llmkit_schedulers"}
    assert (site / "llmkit" / "conf" / "config.yaml").is_file()
    assert all((site / name / "py.typed").is_file() for name in names)


def test_runs_from_its_own_conf(site: Path, tmp_path: Path) -> None:
    code = "import llmkit.config as c; print(c.__file__); print(c.conf_dir())"
    module, conf = call(site, tmp_path, "-c", code).stdout.split()
    assert module.startswith(str(site)) and conf == str(site / "llmkit" / "conf")
    composed = call(site, tmp_path, "-m", "llmkit.run", "engine=exact", "--cfg", "job")
    assert composed.returncode == 0, composed.stderr
    assert "dtype: float64" in composed.stdout and "max_num_batched_tokens" in composed.stdout
