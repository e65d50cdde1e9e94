"""`llmkit plugins`: what is installed, by whom, and the options of each part. Torch-free."""

from __future__ import annotations

import sys

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmkit.config import SECTIONS, defaults
from llmkit.errors import ConfigError, allowed, unknown_name
from llmkit.plugins import load_plugins
from llmkit.registry import Registry

PIPE_WIDTH = 180


def console() -> Console:
    """Standard output; wide enough for whole lines when it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def list_plugins() -> int:
    """Print every component with its owner, then the plugins that failed or were kept out."""
    registry, _ = load_plugins()
    table = Table("kind", "name", "owner", "what it is")
    for component in registry.components():
        table.add_row(component.kind, component.name, component.owner, escape(component.doc))
    out = console()
    out.print(table)
    for note in registry.notes():
        out.print(escape(note), style="red", soft_wrap=True)
    return 0


def show_plugin(name: str) -> int:
    """Print the options of every component called `name` ("paged", "cache/paged") or of a section ("engine")."""
    registry, _ = load_plugins()
    tables = _tables(registry, name)
    if not tables and (choices := registry.names(name)):
        raise ConfigError(f"{name} is a group: show one of {', '.join(choices)}")
    if not tables:
        valid = {*SECTIONS, *(component.name for component in registry.components())}
        raise ConfigError(unknown_name("part", name, valid, registry.notes()))
    out = console()
    for title, table in tables:
        out.print(title, soft_wrap=True)
        out.print(table)
    return 0


def _tables(registry: Registry, name: str) -> list[tuple[str, Table | str]]:
    tables: list[tuple[str, Table | str]] = []
    if name in SECTIONS:
        tables.append((f"{name}: options of every run", _options(name, SECTIONS[name])))
    for component in registry.components():
        path = f"{component.kind}/{component.name}"
        if name in (component.name, path, path.replace("/", "=")):
            title = escape(f"{component.kind}={component.name} of {component.owner}: {component.doc}")
            tables.append((title, _options(component.kind, component.settings)))
    return tables


def _options(key: str, model: type[BaseModel]) -> Table | str:
    if not model.model_fields:
        return "no options"
    table = Table("option", "default", "allowed", "what it is")
    for option, value in defaults(model, "required").items():
        field = model.model_fields[option]
        shown = "null" if value is None else str(value)
        row = (f"{key}.{option}", shown, allowed(model, option), field.description or "")
        table.add_row(*(escape(cell) for cell in row))
    return table
