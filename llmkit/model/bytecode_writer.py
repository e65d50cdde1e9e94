"""The program that `bytecode` starts: writes bytecode that is missing. It knows Python's own library only.

    python -B -I -S bytecode_writer.py PROCESSES FOLDER PACKAGE...

Python's compileall will not do: from 3.12 on its processes do not know where they were told to write.
"""

from __future__ import annotations

import contextlib
import os
import py_compile
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.util import cache_from_source

LEFT_OUT = {
    *("__pycache__", "_dynamo", "_export", "_inductor", "_numpy", "_vendor", "cli", "distributed", "exporters"),
    *("inference", "models", "onnx", "pipelines", "sparse", "testing", "tests"),
}
"""Folders of which a start needs little or nothing."""
NICENESS = 10
"""Whoever waits for the bytecode goes first where processors are few."""


def write(num_processes: int, folder: str, packages: Sequence[str]) -> None:
    """Bytecode of all files of `packages` goes where Python looks for it, below `folder` if that is not empty."""
    os.nice(NICENESS)
    sources = [source for package in packages for source in sources_of(package)]
    for share in range(num_processes):
        if os.fork() == 0:
            for source in sources[share::num_processes]:
                compiled = folder + cache_from_source(source)
                if not os.path.exists(compiled):
                    with contextlib.suppress(Exception):  # no room, no source: whoever imports it will see
                        py_compile.compile(source, compiled, doraise=True)
            os._exit(0)
    if folder:
        remove_left_behind(folder)
    for _ in range(num_processes):
        os.wait()


def sources_of(package: str) -> Iterator[str]:
    """Files of Python in a folder and those below it that are not left out."""
    for place, folders, files in os.walk(package):
        folders[:] = sorted(set(folders) - LEFT_OUT)
        yield from (os.path.join(place, file) for file in sorted(files) if file.endswith(".py"))


def remove_left_behind(folder: str) -> None:
    """Folders named as `folder` is, KIND-PID-RANDOM, whose processes were ended before they could remove them."""
    place, name = os.path.split(folder)
    kind = name.rsplit("-", 2)[0]
    for other in os.listdir(place):
        if re.fullmatch(rf"{kind}-\d+-\w+", other) and not is_running(int(other.rsplit("-", 2)[1])):
            shutil.rmtree(os.path.join(place, other), ignore_errors=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


if __name__ == "__main__":
    write(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
