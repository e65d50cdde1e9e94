"""`benchmarks/results.py` puts the table between the README's markers and writes the picture, or changes nothing."""

from __future__ import annotations

import importlib.util
import json
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmkit.metrics.environment import environment
from llmkit.metrics.grid import Cell, Timing, summarise_grid
from llmkit.report.markdown import BEGIN, END

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "results.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def result() -> dict[str, Any]:
    cells = [
        Cell(p, b, 10, [Timing(0.1, 0.1)] * 2, [Timing(0.1 * b * p / 8, 0.1)] * 2, 10, 10, 1)
        for b, p in product((1, 4), (8, 32))
    ]
    environ = {**environment(), "dtype": "float32", "num_threads": 2}
    rest = {"labels": {"model": "m"}, "environment": environ, "baseline": {"naive_dtype": "float32"}}
    return {**summarise_grid(cells), **rest, "interrupted": False, "title": "grid"}


def project(folder: Path, readme: str) -> Path:
    (folder / "README.md").write_text(readme)
    return folder


def test_the_table_replaces_what_stood_between_the_markers(
    script: ModuleType, result: dict[str, Any], tmp_path: Path
) -> None:
    root = project(tmp_path, f"# before\n{BEGIN}\nold table\n{END}\nafter\n")
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert script.main([str(tmp_path / "result.json")], root) == 0
    text = (root / "README.md").read_text()
    assert text.startswith(f"# before\n{BEGIN}\n| batch size |")
    assert text.endswith(f"{END}\nafter\n")
    assert "old table" not in text
    # batch 4: naive takes 0.4 and 1.6 s against 0.1 s: 4x and 16x, geometric mean 8x
    assert "| 4 | 400 | 50 | **8.00x** [8.00, 8.00] | 4.00x to 16.00x |" in text
    assert "prompts of 8, 32 tokens and outputs of 10" in text
    assert (root / "docs" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert script.main([str(tmp_path / "result.json")], root) == 0
    assert (root / "README.md").read_text() == text


@pytest.mark.parametrize("readme", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}{END}{BEGIN}{END}"])
def test_without_markers_nothing_is_written(
    script: ModuleType, result: dict[str, Any], tmp_path: Path, readme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = project(tmp_path, readme)
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert script.main([str(tmp_path / "result.json")], root) == 2
    assert (root / "README.md").read_text() == readme
    assert not (root / "docs").exists()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [("{", "cannot be read"), ("[]", "not the result of a grid"), ('{"rows": []}', "not the result of a grid")],
)
def test_other_files_are_refused(
    script: ModuleType, tmp_path: Path, content: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "result.json").write_text(content)
    assert script.main([str(tmp_path / "result.json")], project(tmp_path, "")) == 2
    assert problem in capsys.readouterr().err


def test_a_run_that_was_cut_short_is_refused(script: ModuleType, result: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result | {"interrupted": True}))
    assert script.main([str(tmp_path / "result.json")], project(tmp_path, "")) == 2
