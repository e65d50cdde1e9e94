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

LIBRARIES = ("torch", "transformers", "huggingface_hub", "triton")
"""The first stands for all: what has bytecode of it is taken to have bytecode of the others."""
FOLDER = "LLMKIT_BYTECODE"
"""Variable by which processes that this one starts find what is made for it, and make nothing themselves."""
WRITER = Path(__file__).with_name("bytecode_writer.py")
LEAST_PROCESSORS, MOST_PROCESSES = 4, 16
CGROUP = Path("/sys/fs/cgroup")


@cache
def compile_libraries() -> Path | None:
    """Have `bytecode_writer` make what is missing, if nothing of it is imported yet and processors are free for it.

    Returns a folder to be handed to `read_from` if Python itself would not look where the bytecode comes to lie: where
    it may write none, that is a temporary folder, which goes when the process ends.
    """
    if os.path.isdir(made_before := os.environ.get(FOLDER, "")):
        return Path(made_before)
    if LIBRARIES[0] in sys.modules or not _can_start_python() or (processors := _num_processors()) < LEAST_PROCESSORS:
        return None
    sources = [source for name in LIBRARIES if (source := _source_of(name)) is not None]
    if not sources or _has_bytecode(sources[0]):
        return None
    options = ["-B", "-I", "-S", *["-O"] * sys.flags.optimize]
    options += ["-X", f"pycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix is not None else []
    packages, nowhere = [str(source.parent) for source in sources], subprocess.DEVNULL
    folder = None
    try:
        if not _may_write(sources[0]):
            folder = Path(tempfile.mkdtemp(prefix=f"llmkit-bytecode-{os.getpid()}-"))
            atexit.register(_remove, folder, os.getpid())
        made = subprocess.Popen(
            [sys.executable, *options, str(WRITER), str(min(MOST_PROCESSES, processors)), str(folder or ""), *packages],
            stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True,
        )  # fmt: skip
    except OSError:
        return None  # what is missing is compiled as it is imported
    atexit.register(_end, made, os.getpid())
    if folder is not None:
        os.environ[FOLDER] = str(folder)
    return folder


def read_from(spec: ModuleSpec | None, folder: Path) -> ModuleSpec | None:
    """`spec`, whose module takes its bytecode from `folder` if Python has none of it."""
    if spec is not None and type(spec.loader) is SourceFileLoader:
        spec.loader.get_data = partial(_data_of, spec.loader, str(folder))  # type: ignore[method-assign]
    return spec


def _data_of(loader: SourceFileLoader, folder: str, path: str) -> bytes:
    """What `path` holds. The loader itself sees whether bytecode is that of its source."""
    if path.endswith(".pyc") and not os.path.exists(path):
        path = folder + path
    return SourceFileLoader.get_data(loader, path)


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


def _can_start_python() -> bool:
    """Not from an application that Python is built into, which would start itself once more."""
    return hasattr(os, "fork") and Path(sys.executable or "").name.startswith("py")


def _num_processors() -> int:
    """Processors that this process may keep busy: a container sees all of its host's, and may get the time of a few."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # versions 2 and 1
        try:
            quota, period = (int(number) for name in names for number in (CGROUP / name).read_text().split())
        except (OSError, ValueError):  # there is none, or its quota is "max"
            continue
        if quota > 0:
            seen = min(seen, quota // period)
    return seen


def _end(made: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner and made.poll() is None:
        os.killpg(made.pid, signal.SIGKILL)
        made.wait()


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # and not in a process forked from it
        shutil.rmtree(folder, ignore_errors=True)
