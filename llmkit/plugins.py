"""Finding plugins: the entry points of group `llmkit`, for built-ins and strangers alike. There is no other door.

A plugin that cannot be imported is kept as failed and named in related errors; everything else still works.
A plugin that breaks a rule (duplicate name, misspelt hook) is refused with one line that names it.
`LLMKIT_PLUGINS` lists the only plugins to load, `LLMKIT_BLOCK` the ones to leave out: distribution or entry point
names, separated by commas.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from pathlib import Path
from traceback import format_exception, walk_tb

import pluggy

from llmkit import hookspecs
from llmkit.errors import LlmkitError, PluginError, unknown_name
from llmkit.registry import Registry

GROUP = "llmkit"


@dataclass(frozen=True, slots=True)
class Source:
    """One entry point: what it is called, who ships it."""

    entry: EntryPoint
    distribution: str
    version: str

    @property
    def plugin(self) -> str:
        """Its unique name, such as "llmkit-lifo:lifo"."""
        return f"{self.distribution}:{self.entry.name}"

    @property
    def owner(self) -> str:
        return f"{self.distribution} {self.version}"

    def is_called(self, name: str) -> bool:
        return normalised(name) in {normalised(n) for n in (self.plugin, self.distribution, self.entry.name)}


def normalised(name: str) -> str:
    """Distribution names are equal if they differ only in case and in "-", "_" or "."."""
    return re.sub(r"[-_.]+", "-", name).lower()


def load_plugins(extra: Iterable[object] = ()) -> tuple[Registry, pluggy.PluginManager]:
    """Everything installed, and `extra` plugin objects (modules or instances with `@hookimpl` functions).

    Raises PluginError if llmkit itself is not installed, or on a duplicate name or a misspelt hook.
    """
    registry, manager = Registry(), pluggy.PluginManager("llmkit")
    manager.add_hookspecs(hookspecs)
    for source in _chosen(_sources(), registry):
        try:
            plugin = source.entry.load()
        except (Exception, SystemExit) as error:
            registry.failures[source.plugin] = _one_line(error)
            continue
        _add(manager, registry, plugin, source.plugin, source.owner)
    if not isinstance(extra, Iterable) or isinstance(extra, str | bytes):
        raise PluginError(f"plugins are a list of plugin objects, not {type(extra).__name__}")
    for plugin in extra:
        if isinstance(plugin, str):
            raise PluginError(f"plugin {plugin!r}: give the module or object itself; installed ones need not be given")
        if isinstance(plugin, type):
            raise PluginError(f"plugin {plugin.__name__} is a class: give an instance, {plugin.__name__}()")
        name = getattr(plugin, "__name__", type(plugin).__name__)
        _add(manager, registry, plugin, f"{name}@{id(plugin):x}", f"the given plugin {name}")
    return registry, manager


@contextmanager
def naming_plugins(registry: Registry, folder: Path | None = None) -> Iterator[None]:
    """What a plugin's code raises inside becomes a PluginError in one line: the plugin, the error, the place.

    The traceback goes to a file in `folder`. LlmkitErrors and what no plugin had a part in go on up as they are.
    """
    try:
        yield
    except (LlmkitError, BrokenPipeError):
        raise
    except Exception as error:
        told = _at_fault(error, registry)
        if told is None:
            raise
        if folder is None:
            told += "; --debug shows the traceback"
        else:
            path = folder / "traceback.txt"
            path.write_text("".join(format_exception(error)))
            told += f"; traceback: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}"
        raise PluginError(told) from error


def _at_fault(error: Exception, registry: Registry) -> str | None:
    """The innermost plugin that was at work when `error` was raised: in its code, or in a method that it inherits."""
    for frame, line in reversed(list(walk_tb(error.__traceback__))):
        modules = frame.f_globals.get("__name__"), type(frame.f_locals.get("self")).__module__
        for who in (registry.packages.get(str(module).partition(".")[0]) for module in modules):
            if who is not None:
                where = f"{Path(frame.f_code.co_filename).name}, line {line}, in {frame.f_code.co_name}"
                return f"{who} failed: {_one_line(error)} ({where})"
    return None


def _sources() -> list[Source]:
    """Installed entry points, llmkit's own first, then by name: the order never depends on the file system."""
    found = [
        Source(entry, entry.dist.name if entry.dist else "unknown", entry.dist.version if entry.dist else "?")
        for entry in entry_points(group=GROUP)
    ]
    if not any(normalised(source.distribution) == "llmkit" for source in found):
        root = Path(__file__).parents[1]
        raise PluginError(f"llmkit is imported but not installed, so it has no plugins: run `pip install -e {root}`")
    return sorted(found, key=lambda s: (normalised(s.distribution) != "llmkit", s.plugin))


def _chosen(sources: Sequence[Source], registry: Registry) -> list[Source]:
    """Apply the two environment variables; what they keep out is noted in `registry.blocked`."""
    allowed, blocked = _names_in("LLMKIT_PLUGINS", sources), _names_in("LLMKIT_BLOCK", sources)
    chosen = []
    for source in sources:
        if any(source.is_called(name) for name in blocked):
            registry.blocked[source.plugin] = "LLMKIT_BLOCK"
        elif allowed and not any(source.is_called(name) for name in allowed):
            registry.blocked[source.plugin] = "LLMKIT_PLUGINS"
        else:
            chosen.append(source)
    return chosen


def _names_in(variable: str, sources: Sequence[Source]) -> list[str]:
    names = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
    valid = {name for source in sources for name in (source.distribution, source.plugin)}
    for name in names:
        if not any(source.is_called(name) for source in sources):
            raise PluginError(f"{variable}: {unknown_name('plugin', name, valid)}")
    return names


def _add(manager: pluggy.PluginManager, registry: Registry, plugin: object, name: str, owner: str) -> None:
    """Register the plugin's hooks, then its components, which belong to `owner`."""
    who = owner if "@" in name else f"plugin {name} of {owner}"
    try:
        manager.register(plugin, name=name)
        manager.check_pending()
    except (ValueError, pluggy.PluginValidationError) as error:
        raise PluginError(f"{who}: {_hook_problem(error)}") from None
    if not manager.get_hookcallers(plugin):
        raise PluginError(f"{who} implements no hook: mark functions with @llmkit.hookimpl")
    package = getattr(plugin, "__name__", type(plugin).__module__).partition(".")[0]
    if package != __package__:  # the core is no plugin's code, though models and workloads come from it
        registry.packages[package] = who
    others = [other for other in manager.get_plugins() if other is not plugin]
    try:
        with registry.owned_by(owner):
            manager.subset_hook_caller("llmkit_register", others)(registry=registry)
    except PluginError:
        raise
    except Exception as error:
        manager.unregister(plugin)
        registry.failures[name] = _one_line(error)


def _hook_problem(error: Exception) -> str:
    """pluggy's complaint (unknown hook, wrong arguments, registered twice) with the valid hooks."""
    unknown = re.match(r"unknown hook '(\w+)'", str(error))
    if wrong := re.search(r"for hook '(\w+)'.*Argument\(s\) \{(.+?)\}", str(error), re.DOTALL):
        takes = ", ".join(signature(getattr(hookspecs, wrong[1])).parameters)
        return f"hook {wrong[1]} has no argument {wrong[2]} (arguments: {takes})"
    if unknown is None:
        return _one_line(error)
    return unknown_name("hook", unknown[1], (name for name in vars(hookspecs) if name.startswith("llmkit_")))


def _one_line(error: BaseException) -> str:
    """The error's type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
