"""The training text: every Python file of the standard library, in one fixed order, with a held-out part.

Nothing here depends on time, locale or directory order: the same tree gives the same documents and the same split.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Corpus", "collect", "stdlib"]

# Installed packages are not the standard library; the other two are generated tables, not code anyone wrote.
SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"})
HELD_OUT_PER_MILLE = 25


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents never trained on, with a digest of all of them in order."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    sha256: str


def stdlib() -> Path:
    """The running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def collect(root: Path) -> Corpus:
    """Read the `.py` files under `root`, tests included (they are over half of the text, and code like the rest).

    A file is left out when it is empty, not UTF-8, not valid Python for the running interpreter, or a copy of an
    earlier one. The content's SHA-256 decides which side a file falls on, so about 2.5 % of the files are held out
    wherever they lie in the tree.

    Raises ValueError if either side would be empty.
    """
    train: list[str] = []
    held_out: list[str] = []
    seen: set[bytes] = set()
    whole = hashlib.sha256()
    for text in _texts(root):
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        whole.update(digest)
        side = held_out if int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE else train
        side.append(text)
    if not train or not held_out:
        raise ValueError(f"{root} holds too few Python files: {len(train)} to train on, {len(held_out)} held out")
    return Corpus(tuple(train), tuple(held_out), whole.hexdigest())


def _texts(root: Path) -> Iterator[str]:
    files = (file for file in root.rglob("*.py") if not SKIPPED.intersection(file.relative_to(root).parts))
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        try:
            text = file.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip() and _is_python(text):
            yield text


def _is_python(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True
