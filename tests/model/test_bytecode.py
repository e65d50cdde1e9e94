"""Bytecode that other processes make where Python has none and may write none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmkit.model import bytecode

NAME = "a_library_without_bytecode"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package for which four processors are free, and where Python writes no bytecode."""
    package = tmp_path / "site" / NAME
    (package / "models").mkdir(parents=True)
    for path in ("__init__.py", "part.py", "models/one.py"):
        (package / path).write_text(f"WHERE = {path!r}\n")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(bytecode, "LIBRARIES", (NAME, "there_is_no_such_library"))
    monkeypatch.setattr(bytecode, "_num_processors", lambda: 4)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    endings: list[Any] = []
    monkeypatch.setattr(bytecode.atexit, "register", lambda *ending: endings.append(ending))
    bytecode.compile_libraries.cache_clear()
    yield package
    bytecode.compile_libraries.cache_clear()
    for end, *arguments in endings:
        end(*arguments)
    assert not list(tmp_path.glob("llmkit-bytecode-*"))


@pytest.fixture(autouse=True)
def own_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytecode.tempfile, "tempdir", str(tmp_path))


def made_in(folder: Path) -> list[str]:
    """The modules of the library that have bytecode in `folder`, as soon as there are two."""
    until = time.monotonic() + 60
    while len(found := sorted(path.name.partition(".")[0] for path in folder.rglob(f"**/{NAME}/**/*.pyc"))) < 2:
        assert time.monotonic() < until, found
        time.sleep(0.02)
    return found


def imported(name: str, folder: Path) -> ModuleType:
    """The module of `name` by the loader that reads from `folder`."""
    spec = bytecode.read_from(PathFinder.find_spec(name), folder)
    assert spec is not None and spec.loader is not None
    module = ModuleType(name)
    spec.loader.exec_module(module)
    return module


def test_a_module_comes_from_the_bytecode_that_others_made(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bytecode.compile_libraries()
    assert folder is not None and bytecode.compile_libraries() is folder, "once a process"
    assert made_in(folder) == ["__init__", "part"], "what is left out stays out"
    assert not list(library.rglob("*.pyc")), "nothing is written where Python may not write"
    with monkeypatch.context() as patch:
        patch.setattr(SourceFileLoader, "source_to_code", lambda *_, **__: pytest.fail("compiled once more"))
        assert imported(NAME, folder).WHERE == "__init__.py"
    assert sys.pycache_prefix is None


def test_bytecode_of_another_source_or_none_is_no_harm(library: Path) -> None:
    folder = bytecode.compile_libraries()
    assert folder is not None
    made_in(folder)
    (library / "__init__.py").write_text("WHERE = 'changed since then'\n")
    assert imported(NAME, folder).WHERE == "changed since then"
    assert imported(NAME, folder / "empty").WHERE == "changed since then"
    assert bytecode.read_from(None, folder) is None


def test_where_python_may_write_it_finds_the_bytecode_itself(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert bytecode.compile_libraries() is None
    assert made_in(library.parent) == ["__init__", "part"]


def test_bytecode_goes_where_python_was_told_to_look(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "prefix"))
    assert bytecode.compile_libraries() is None
    assert made_in(tmp_path / "prefix") == ["__init__", "part"]
    assert not list(library.rglob("*.pyc"))


@pytest.mark.parametrize("why", ["made", "imported", "few processors", "no such library"])
def test_nothing_starts_where_it_would_not_help(library: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "made":
        subprocess.run([sys.executable, "-m", "compileall", "-qq", str(library)], check=True)
    elif why == "imported":
        monkeypatch.setitem(sys.modules, NAME, ModuleType(NAME))
    elif why == "few processors":
        monkeypatch.setattr(bytecode, "_num_processors", lambda: 3)
    else:
        monkeypatch.setattr(bytecode, "LIBRARIES", ("there_is_no_such_library",))
    monkeypatch.setattr(bytecode.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert bytecode.compile_libraries() is None


def test_a_start_without_processes_goes_on(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError("no process left")

    monkeypatch.setattr(bytecode.subprocess, "Popen", refuse)
    folder = bytecode.compile_libraries()
    assert folder is not None and imported(NAME, folder).WHERE == "__init__.py"


IMPORTS = """
import sys
from llmkit.model import bytecode
bytecode._num_processors = lambda: 4
import llmkit.llm
folder = bytecode.compile_libraries()
print(folder, sys.modules["torch"].__spec__.loader.get_code.args[1], sys.pycache_prefix)
"""


def test_torch_is_imported_from_it_and_nothing_is_left(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(tmp_path / "none")}
    command = [sys.executable, "-c", IMPORTS]
    environment["TMPDIR"] = str(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    folder, read, prefix = done.stdout.split()
    assert folder == read and Path(folder).parent == tmp_path and prefix == str(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
