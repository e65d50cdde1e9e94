"""Bytecode of the libraries that take longest to import, made by other processes where Python has none.

Images often come without it and tell Python to write none. Then every start compiles 1,000 files of these libraries
one by one, which takes longer than all else of their imports.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache, partial
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType

LIBRARIES = ("torch", "transformers", "huggingface_hub", "triton")
"""The first stands for all: what has bytecode of it is taken to have bytecode of the others."""
LEFT_OUT = (
    r"[\\/](_dynamo|_export|_inductor|_numpy|_vendor|cli|distributed|exporters|inference|models|onnx|pipelines|sparse"
    r"|testing|tests)[\\/]"
)
"""Folders of which a start needs little or nothing."""
LEAST_PROCESSORS, MOST_PROCESSES = 4, 16


@cache
def compile_libraries() -> Path | None:
    """Have Python's compileall make what is missing, if nothing of it is imported yet and processors are free for it.

    Returns a folder to be handed to `read_from` if Python itself would not look where the bytecode comes to lie: where
    it may write none, that is a temporary folder, which goes when the process ends.
    """
    if LIBRARIES[0] in sys.modules or _num_processors() < LEAST_PROCESSORS:
        return None
    sources = [source for name in LIBRARIES if (source := _source_of(name)) is not None]
    if not sources or _has_bytecode(sources[0]):
        return None
    folder = None if _may_write(sources[0]) else Path(tempfile.mkdtemp(prefix="llmkit-bytecode-"))
    prefix = folder or sys.pycache_prefix
    command = [sys.executable, "-I", "-S", *(["-X", f"pycache_prefix={prefix}"] if prefix else [])]
    command += ["-m", "compileall", "-qq", "-j", str(min(MOST_PROCESSES, _num_processors())), "-x", LEFT_OUT]
    command += [str(source.parent) for source in sources]
    nowhere = subprocess.DEVNULL
    try:
        made = subprocess.Popen(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True)
    except OSError:
        made = None  # what is missing is compiled as it is imported
    atexit.register(_end, made, folder)
    return folder


def read_from(spec: ModuleSpec | None, folder: Path) -> ModuleSpec | None:
    """`spec`, whose module takes its bytecode from `folder` if it is there and is that of the source."""
    if spec is not None and type(spec.loader) is SourceFileLoader:
        spec.loader.get_code = partial(_code_of, spec.loader, str(folder))  # type: ignore[method-assign]
    return spec


def _code_of(loader: SourceFileLoader, folder: str, name: str) -> CodeType | None:
    before, sys.pycache_prefix = sys.pycache_prefix, folder
    try:
        return SourceFileLoader.get_code(loader, name)
    finally:
        sys.pycache_prefix = before


def _source_of(name: str) -> Path | None:
    """The file of a package that is installed as files."""
    spec = PathFinder.find_spec(name)
    source = Path(spec.origin) if spec is not None and spec.origin is not None else None
    return source if source is not None and source.is_file() else None


def _has_bytecode(source: Path) -> bool:
    return Path(importlib.util.cache_from_source(str(source))).exists()


def _may_write(source: Path) -> bool:
    """Whether Python itself would keep the bytecode of `source`."""
    return not sys.dont_write_bytecode and (sys.pycache_prefix is not None or os.access(source.parent, os.W_OK))


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end(made: subprocess.Popen[bytes] | None, folder: Path | None) -> None:
    if made is not None and made.poll() is None and hasattr(os, "killpg"):
        os.killpg(made.pid, signal.SIGKILL)
        made.wait()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
