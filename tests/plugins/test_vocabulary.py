"""`from llmkit import ...`: one sorted list, every name there, and no plugin reaches past it."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import llmkit
from llmkit import hookspecs

ROOT = Path(llmkit.__file__).parents[1]
PUBLIC = ("llmkit.cuda", "llmkit.interfaces", "llmkit.testing")


def test_all_is_sorted_and_complete() -> None:
    assert llmkit.__all__ == sorted(llmkit.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert len(set(llmkit.__all__)) == len(llmkit.__all__)
    assert set(llmkit.__all__) <= set(dir(llmkit))
    for name in llmkit.__all__:
        assert getattr(llmkit, name) is not None
    namespace: dict[str, object] = {}
    exec("from llmkit import *", namespace)
    assert set(llmkit.__all__) <= set(namespace)


def test_lazy_names_are_what_type_checkers_see() -> None:
    tree = ast.parse(Path(llmkit.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == llmkit._LAZY
    for name, module in seen.items():
        assert getattr(llmkit, name) is getattr(importlib.import_module(str(module)), name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'llmkit' has no attribute 'LMM'"):
        llmkit.LMM  # noqa: B018


def test_plugins_import_only_the_vocabulary() -> None:
    files = [*ROOT.glob("plugins/*/**/*.py"), *ROOT.glob("docs/examples/*/*.py")]
    assert len(files) > 8
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "llmkit":
                assert node.module == "llmkit" or node.module.startswith(PUBLIC), f"{path}: {node.module}"


def test_every_hook_is_documented_where_authors_look() -> None:
    names = [name for name in vars(hookspecs) if name.startswith("llmkit_")]
    page = (ROOT / "docs" / "writing-a-plugin.md").read_text()
    assert names
    for name in names:
        assert getattr(hookspecs, name).__doc__, name
        assert f"`{name}`" in page, f"{name} is missing in docs/writing-a-plugin.md"
