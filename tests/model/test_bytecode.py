"""Bytecode that other processes make where Python has none and may write none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
    package = tmp_path / "models" / "site packages" / NAME
    (package / "models").mkdir(parents=True)
    for path in ("__init__.py", "part.py", "models/one.py"):
        (package / path).write_text(f"WHERE = {path!r}\n")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(bytecode, "LIBRARIES", (NAME, "there_is_no_such_library"))
    monkeypatch.setattr(bytecode, "_num_processors", lambda: 4)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.delenv(bytecode.FOLDER, raising=False)
    endings: list[Any] = []
    monkeypatch.setattr(bytecode.atexit, "register", lambda *ending: endings.append(ending))
    bytecode.compile_libraries.cache_clear()
    yield package
    bytecode.compile_libraries.cache_clear()
    os.environ.pop(bytecode.FOLDER, None)
    for end, *arguments in reversed(endings):
        end(*arguments)
    assert not list(tmp_path.glob("llmkit-bytecode-*"))


@pytest.fixture(autouse=True)
def own_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytecode.tempfile, "tempdir", str(tmp_path))


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def made_in(folder: Path) -> list[str]:
    """The modules of the library that have bytecode in `folder`, as soon as there are two."""
    found: list[str] = []

    def look() -> bool:
        found[:] = sorted(path.name.partition(".")[0] for path in folder.rglob(f"**/{NAME}/**/*.pyc"))
        return len(found) > 1

    wait_for(look)
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


def test_imports_of_other_threads_meanwhile_look_where_they_always_do(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixes = []
    monkeypatch.setattr(SourceFileLoader, "path_stats", lambda *_: prefixes.append(sys.pycache_prefix))
    folder = bytecode.compile_libraries()
    with pytest.raises(TypeError):
        imported(NAME, folder)
    assert prefixes == [None]


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


@pytest.mark.parametrize("why", ["made", "imported", "few processors", "no such library", "built in", "no Python"])
def test_nothing_starts_where_it_would_not_help(library: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "made":
        subprocess.run([sys.executable, "-m", "compileall", "-qq", str(library)], check=True)
    elif why == "imported":
        monkeypatch.setitem(sys.modules, NAME, ModuleType(NAME))
    elif why == "few processors":
        monkeypatch.setattr(bytecode, "_num_processors", lambda: 3)
    elif why == "no such library":
        monkeypatch.setattr(bytecode, "LIBRARIES", ("there_is_no_such_library",))
    else:
        monkeypatch.setattr(sys, "executable", "/usr/bin/an_application" if why == "built in" else None)
    monkeypatch.setattr(bytecode.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert bytecode.compile_libraries() is None


@pytest.mark.parametrize("part", [(bytecode.subprocess, "Popen"), (bytecode.tempfile, "mkdtemp")])
def test_a_start_without_processes_or_room_goes_on(library: Path, monkeypatch: pytest.MonkeyPatch, part: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError("nothing left")

    monkeypatch.setattr(*part, refuse)
    assert bytecode.compile_libraries() is None


@pytest.mark.parametrize(
    ("files", "number"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000"}, 16),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_a_container_may_keep_fewer_processors_busy_than_it_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], number: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(bytecode, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert bytecode._num_processors() == number


def test_what_killed_processes_left_behind_goes(library: Path, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, kept = (tmp_path / f"llmkit-bytecode-{process}-abc" for process in (ended.pid, os.getpid()))
    left.mkdir()
    kept.mkdir()
    folder = bytecode.compile_libraries()
    assert folder is not None
    wait_for(lambda: not left.exists())
    assert kept.is_dir() and folder.is_dir()
    kept.rmdir()


START = """
import multiprocessing, os, sys
from llmkit.model import bytecode
bytecode._num_processors = lambda: 4
"""
IMPORTS = f"""{START}
import llmkit.llm
folder = bytecode.compile_libraries()
print(folder, sys.modules["torch"].__spec__.loader.get_data.args[1], sys.pycache_prefix)
"""
CHILDREN = f"""{START}
def look():
    print(bytecode.compile_libraries(), flush=True)

if __name__ == "__main__":
    look()
    if os.fork() == 0:
        look()
        sys.exit()
    os.wait()
    for method in ("fork", "spawn"):
        child = multiprocessing.get_context(method).Process(target=look)
        child.start()
        child.join()
    print(os.path.isdir(bytecode.compile_libraries()))
"""


def run_without_bytecode(program: str, tmp_path: Path) -> list[str]:
    """The words that `program` prints; afterwards there is nothing else in `tmp_path`."""
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": str(tmp_path / "none")}
    environment |= {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]
    return done.stdout.split()


def test_torch_is_imported_from_it_and_nothing_is_left(tmp_path: Path) -> None:
    folder, read, prefix = run_without_bytecode(IMPORTS, tmp_path)
    assert folder == read and Path(folder).parent == tmp_path and prefix == str(tmp_path / "none")


def test_children_read_what_is_made_for_their_parent_and_leave_it_there(tmp_path: Path) -> None:
    *folders, is_there = run_without_bytecode(CHILDREN, tmp_path)
    assert len(folders) == 4 and len(set(folders)) == 1 and is_there == "True"
