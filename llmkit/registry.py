"""Names -> component, its settings and who brought it. Refuses duplicates and wrong names; never imports torch."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any, Literal

from pydantic import create_model

from llmkit.errors import ConfigError, PluginError, unknown_name
from llmkit.interfaces.cache import CacheAllocator
from llmkit.interfaces.eviction import EvictionPolicy
from llmkit.interfaces.scheduler import Scheduler
from llmkit.interfaces.settings import Settings
from llmkit.overrides import complaints

log = logging.getLogger(__name__)

KINDS = ("scheduler", "cache", "attention", "model", "workload")
PARTS = ("eviction",)
"""Kinds without a group of their own: an option of that name, in the settings of a component, chooses among them."""
RESERVED = {"attention": {"auto"}}
CONTRACTS: dict[str, type] = {"scheduler": Scheduler, "cache": CacheAllocator, "eviction": EvictionPolicy}
"""What a class must derive from; that of attention is left to its use, since it needs torch."""
ARGUMENTS = {"scheduler": ("settings",), "cache": ("settings", "spec"), "eviction": ()}
"""What such a class is made with."""


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
        """The class or factory; imports its module if it was registered as "module:attribute".

        Warns of members that look like misspelt overrides. PluginError if it is not of its kind's contract, lacks
        methods of it, or cannot be made as the core makes it.
        """
        target = self._import() if isinstance(self.target, str) else self.target
        contract = CONTRACTS.get(self.kind)
        if contract and not (isinstance(target, type) and issubclass(target, contract)):
            raise PluginError(f"{self.kind} {self.name!r} of {self.owner} is no subclass of llmkit.{contract.__name__}")
        told = complaints(target) if isinstance(target, type) else []
        if lacking := sorted(getattr(target, "__abstractmethods__", ())):
            says = f"{self.kind} {self.name!r} of {self.owner} lacks {', '.join(lacking)}"
            raise PluginError("; ".join([says, *told]))
        if contract and isinstance(target, type):
            self._check_constructor(target)
        for complaint in told:
            log.warning("%s %r of %s: %s", self.kind, self.name, self.owner, complaint)
        return target

    def _check_constructor(self, target: type) -> None:
        arguments = ARGUMENTS[self.kind]
        try:
            signature(target).bind(*arguments)
        except TypeError as error:
            call = f"{target.__name__}({', '.join(arguments)})"
            raise PluginError(f"{self.kind} {self.name!r} of {self.owner} cannot be made by {call}: {error}") from None

    def _import(self) -> Any:
        module, _, attribute = str(self.target).partition(":")
        try:
            return getattr(import_module(module), attribute)
        except Exception as error:
            raise PluginError(f"{self.kind} {self.name!r} of {self.owner} failed to import: {error}") from error


class Registry:
    """What is installed. Plugins fill it from the hook `llmkit_register`."""

    def __init__(self) -> None:
        self._components: dict[tuple[str, str], Component] = {}
        self._offering: dict[tuple[type[Settings], Any], type[Settings]] = {}
        self.failures: dict[str, str] = {}
        self.blocked: dict[str, str] = {}
        self.packages: dict[str, str] = {}
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
        if kind not in (*KINDS, *PARTS):
            raise PluginError(f"{self.owner}: {unknown_name('kind of component', kind, (*KINDS, *PARTS))}")
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
            raise ConfigError(unknown_name(kind, name, self.names(kind), self.notes(kind)))
        return self._with_parts(component)

    def _with_parts(self, component: Component) -> Component:
        """The component, its options offering whatever parts are registered by now."""
        parts = tuple((part, tuple(self.names(part))) for part in PARTS if part in component.settings.model_fields)
        if not any(names for _, names in parts):
            return component
        key = component.settings, parts
        if key not in self._offering:
            found = {part: [self._components[part, name] for name in names] for part, names in parts}
            self._offering[key] = _offering(component.settings, found)
        return replace(component, settings=self._offering[key])

    def notes(self, kind: str = "") -> list[str]:
        """What an error about a missing name should add: how a checkpoint is named, who failed or was kept out."""
        checkpoint = "a checkpoint is its folder or hub id, for `llmkit run` model=hf model.path=DIR"
        own = [checkpoint] if kind == "model" and "hf" in self.names("model") else []
        failed = own + [f"plugin {plugin} failed: {reason}" for plugin, reason in self.failures.items()]
        return failed + [f"plugin {plugin} is kept out by {reason}" for plugin, reason in self.blocked.items()]

    def names(self, kind: str) -> list[str]:
        """Registered names of `kind`, sorted."""
        return sorted(name for other, name in self._components if other == kind)

    def components(self) -> list[Component]:
        """Everything registered, by kind, then name."""
        kinds = (*KINDS, *PARTS)
        components = sorted(self._components.values(), key=lambda c: (kinds.index(c.kind), c.name))
        return [self._with_parts(component) for component in components]

    def add_scheduler(self, name: str, target: str | Callable[..., Any], settings: type[Settings] = Settings) -> None:
        """Register a `Scheduler` class."""
        self.add("scheduler", name, target, settings)

    def add_cache(self, name: str, target: str | Callable[..., Any], settings: type[Settings] = Settings) -> None:
        """Register a `CacheAllocator` class."""
        self.add("cache", name, target, settings)

    def add_eviction(self, name: str, target: str | Callable[..., Any]) -> None:
        """Register an `EvictionPolicy` class: a choice of every cache with an option called `eviction`."""
        self.add("eviction", name, target)

    def add_attention(self, name: str, target: str, settings: type[Settings] = Settings, doc: str = "") -> None:
        """Register an `AttentionBackend` as "module:class", so that listing it does not import torch."""
        self.add("attention", name, target, settings, doc)


def _offering(settings: type[Settings], parts: Mapping[str, Sequence[Component]]) -> type[Settings]:
    """`settings` whose options called like a part take the names of these components; its `parts` makes them."""
    literal: Any = Literal
    fields: dict[str, Any] = {
        part: (literal[tuple(one.name for one in components)], copy(settings.model_fields[part]))
        for part, components in parts.items()
    }
    offering = create_model(settings.__name__, __base__=settings, __module__=settings.__module__, **fields)
    offering.parts = {part: {one.name: partial(_make, one) for one in components} for part, components in parts.items()}
    return offering


def _make(component: Component) -> Any:
    return component.load()()
