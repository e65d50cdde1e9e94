"""Names -> component, its settings and who brought it. Refuses duplicates and wrong names; never imports torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from llmkit.errors import ConfigError, PluginError, unknown_name
from llmkit.interfaces.settings import Settings

KINDS = ("scheduler", "cache", "attention", "model", "workload")
RESERVED = {"attention": {"auto"}}


@dataclass(frozen=True, slots=True)
class Component:
    """One registered name: `load()` returns the class or factory, `settings` are its options."""

    kind: str
    name: str
    settings: type[Settings]
    target: str | Callable[..., Any]
    owner: str
    doc: str

    def load(self) -> Any:
        """The class or factory; imports its module if it was registered as "module:attribute"."""
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except Exception as error:
            raise PluginError(f"{self.kind} {self.name!r} of {self.owner} failed to import: {error}") from error


class Registry:
    """What is installed. Plugins fill it from the hook `llmkit_register`."""

    def __init__(self) -> None:
        self._components: dict[tuple[str, str], Component] = {}
        self.failures: dict[str, str] = {}
        self.blocked: dict[str, str] = {}
        self.owner = "the core"

    @contextmanager
    def owned_by(self, owner: str) -> Iterator[None]:
        """Whatever is registered inside belongs to `owner`; if the block raises, none of it stays."""
        before, previous = dict(self._components), self.owner
        self.owner = owner
        try:
            yield
        except BaseException:
            self._components = before
            raise
        finally:
            self.owner = previous

    def add(
        self, kind: str, name: str, target: str | Callable[..., Any], settings: type[Settings] = Settings, doc: str = ""
    ) -> None:
        """Register a component. `target`: a class, a factory or "module:attribute", imported when first used.

        A class brings its `Settings`; a lazy target names them in `settings`. PluginError on a bad or taken name.
        """
        if kind not in KINDS:
            raise PluginError(f"{self.owner}: {unknown_name('kind of component', kind, KINDS)}")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in RESERVED.get(kind, ()):
            raise PluginError(f"{self.owner}: {name!r} cannot name a {kind} (lower case letters, digits, _; no 'auto')")
        other = self._components.get((kind, name))
        if other is not None:
            raise PluginError(f"{kind} {name!r} is registered twice: by {other.owner} and by {self.owner}")
        if not isinstance(target, str):
            settings = getattr(target, "Settings", settings)
            doc = doc or (target.__doc__ or "").strip().partition("\n")[0]
        if not (isinstance(settings, type) and issubclass(settings, Settings)):
            raise PluginError(f"{self.owner}: the settings of {kind} {name!r} must subclass llmkit.Settings")
        if "name" in settings.model_fields:
            raise PluginError(f"{self.owner}: {kind} {name!r} may not have an option called 'name'")
        self._components[kind, name] = Component(kind, name, settings, target, self.owner, doc)

    def get(self, kind: str, name: str) -> Component:
        """The component of that name; ConfigError with the valid choices and failed plugins otherwise."""
        component = self._components.get((kind, name))
        if component is None:
            raise ConfigError(unknown_name(kind, name, self.names(kind), self.notes()))
        return component

    def notes(self) -> list[str]:
        """What an error about a missing name should add: the plugins that failed or were kept out."""
        failed = [f"plugin {plugin} failed: {reason}" for plugin, reason in self.failures.items()]
        return failed + [f"plugin {plugin} is kept out by {reason}" for plugin, reason in self.blocked.items()]

    def names(self, kind: str) -> list[str]:
        """Registered names of `kind`, sorted."""
        return sorted(name for other, name in self._components if other == kind)

    def components(self) -> list[Component]:
        """Everything registered, by kind, then name."""
        return sorted(self._components.values(), key=lambda c: (KINDS.index(c.kind), c.name))

    def add_scheduler(self, name: str, target: str | Callable[..., Any], settings: type[Settings] = Settings) -> None:
        """Register a `Scheduler` class."""
        self.add("scheduler", name, target, settings)

    def add_cache(self, name: str, target: str | Callable[..., Any], settings: type[Settings] = Settings) -> None:
        """Register a `CacheAllocator` class."""
        self.add("cache", name, target, settings)

    def add_attention(self, name: str, target: str, settings: type[Settings] = Settings, doc: str = "") -> None:
        """Register an `AttentionBackend` as "module:class", so that listing it does not import torch."""
        self.add("attention", name, target, settings, doc)
