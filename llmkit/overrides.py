"""Finds what a class of a plugin means to override but misspells: it would silently keep its default."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from types import CodeType
from typing import Any

ALIKE = 0.8
"""Names at least as similar as that (`difflib`) are taken for each other."""


def misspelt(component: type) -> list[tuple[str, str]]:
    """Public members of `component` that override nothing, each with the name of llmkit's contract that it resembles.

    A member is not meant if its class has the other one too, or uses it.
    """
    contract = {name for cls in component.__mro__ if _is_ours(cls) for name in vars(cls) if name[0] != "_"}
    found = []
    for cls in component.__mro__:
        if _is_ours(cls) or cls is object:
            continue
        own = {name for name in vars(cls) if name[0] != "_"}
        for name in sorted(own - contract - set(_used(cls))):
            found += [(name, near) for near in get_close_matches(name, contract - own, n=1, cutoff=ALIKE)]
    return found


def complaints(component: type) -> list[str]:
    """One line for each of `misspelt`."""
    return [
        f"{component.__name__}.{name} overrides nothing; did you mean {near!r}?" for name, near in misspelt(component)
    ]


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "llmkit"


def _used(cls: type) -> Iterator[str]:
    """Every name that the methods of `cls` mention."""
    for member in vars(cls).values():
        function: Any = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if code := getattr(function, "__code__", None):
            yield from _names(code)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
