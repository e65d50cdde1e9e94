"""Kernels that are loaded by several threads."""

from __future__ import annotations

from types import ModuleType

import pytest
from triton.runtime import build

from llmkit.model import rehearsal


def test_threads_do_not_find_each_others_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python imports an extension again: whatever its file, the module of its name comes back, filled anew."""
    shared = ModuleType("launcher")

    def load(name: str, path: str) -> ModuleType:
        vars(shared)["launch"] = path
        return shared

    monkeypatch.setattr(build, "_load_module_from_path", load)
    with rehearsal._launchers_apart():
        mine, theirs = (build._load_module_from_path("launcher", path) for path in ("mine", "theirs"))
    assert (mine.launch, theirs.launch) == ("mine", "theirs")
    assert build._load_module_from_path is load
