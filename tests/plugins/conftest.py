"""Distributions that exist only in a test: a module and the metadata an installer would leave beside it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Install = Callable[..., str]


def write_distribution(
    site: Path, module: str, source: str, name: str, version: str = "1.0", entry: str | None = None
) -> None:
    """Write `module`.py and the dist-info of distribution `name` with one entry point into `site`."""
    (site / f"{module}.py").write_text(source)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[llmkit]\n{entry or module} = {module}\n")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(module, source, name)` puts a distribution on this process's path; returns the module's name."""
    modules: list[str] = []
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(module: str, source: str, name: str, version: str = "1.0", entry: str | None = None) -> str:
        write_distribution(tmp_path, module, source, name, version, entry)
        modules.append(module)
        importlib.invalidate_caches()
        return module

    yield add
    for module in modules:
        sys.modules.pop(module, None)
