"""What is done to a module of torch or transformers as soon as it has been imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

DYNAMO = "torch._dynamo"


def then(spec: ModuleSpec | None, act: Callable[[ModuleType], None]) -> ModuleSpec | None:
    """`spec`, whose module is handed to `act` as soon as it has run."""
    if spec is not None and spec.loader is not None:
        run = spec.loader.exec_module

        def run_and_act(module: ModuleType) -> None:
            run(module)
            act(module)

        spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
    return spec


def look_at_ends(reader: ModuleType) -> None:
    """Have `__all__` looked for where it is; transformers compares every line of 1,500 files with it."""
    listed: Callable[[str], list[str]] = getattr(reader, "fetch__all__", lambda _: [])

    def fetch(text: str) -> list[str]:
        begin = text.rfind("\n__all__") + 1
        return listed(text[begin:]) if begin or text.startswith("__all__") else []

    reader.fetch__all__ = fetch  # type: ignore[attr-defined]


def when_dynamo_comes(mark: str, function: Any) -> Any:
    """Have torch._dynamo mark `function` as soon as somebody imports it, as in an ordinary import it would now."""
    waiting = next((finder for finder in sys.meta_path if isinstance(finder, _Marking)), None)
    if waiting is None:
        waiting = _Marking()
        sys.meta_path.insert(0, waiting)
    waiting.marks.append((mark, function))
    return function


class _Marking(MetaPathFinder):
    """Finds torch._dynamo as usual, but has it handed the functions that were waiting for it."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, Any]] = []

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return then(PathFinder.find_spec(name, path, target), self._mark) if name == DYNAMO else None

    def _mark(self, dynamo: ModuleType) -> None:
        sys.meta_path.remove(self)
        for mark, function in self.marks:
            getattr(dynamo, mark)(function)
