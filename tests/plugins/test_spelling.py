"""A method that a class means to override but misspells would silently keep its default."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from llmkit import (
    CacheAllocator,
    ContinuousBatching,
    PluginError,
    Registry,
    RequestQueue,
    Scheduler,
    SchedulingStep,
    hookimpl,
    load_plugins,
)
from llmkit.overrides import misspelt
from llmkit.registry import Component
from llmkit.testing import check_cache, check_scheduler
from llmkit_attention.sdpa import SdpaAttention
from llmkit_caches.paged import PagedCache
from llmkit_schedulers.continuous import Continuous


def bearing(base: type, **members: Any) -> type:
    """A subclass of `base`, of no module of llmkit's, with these members."""
    return type("Mine", (base,), {"__module__": "somewhere", **members})


def does_nothing(self: object, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("base", "name", "meant"),
    [
        (ContinuousBatching, "order_wating", "order_waiting"),
        (ContinuousBatching, "order_runing", "order_running"),
        (ContinuousBatching, "admti", "admit"),
        (ContinuousBatching, "victims", "victim"),
        (ContinuousBatching, "outrank", "outranks"),
        (Continuous, "chunck", "chunk"),
        (Scheduler, "repeat", "repeats"),
        (PagedCache, "num_mising_blocks", "num_missing_blocks"),
        (CacheAllocator, "reuse_prefixes", "reuses_prefixes"),
        (CacheAllocator, "is_gropable", "is_groupable"),
        (SdpaAttention, "capturabel", "capturable"),
        (SdpaAttention, "Setings", "Settings"),
    ],
)
def test_a_near_miss_is_found(base: type, name: str, meant: str) -> None:
    assert misspelt(bearing(base, **{name: does_nothing})) == [(name, meant)]
    assert misspelt(bearing(bearing(base, **{name: does_nothing}))) == [(name, meant)], "inherited"


@pytest.mark.parametrize("name", ["rank_all", "order", "_chunks", "__chunk__", "num_running", "admission", "window"])
def test_other_names_are_nobodys_business(name: str) -> None:
    assert misspelt(bearing(ContinuousBatching, **{name: does_nothing})) == []


def test_a_helper_beside_the_override_is_no_mistake() -> None:
    assert misspelt(bearing(ContinuousBatching, chunk=does_nothing, chunks=does_nothing)) == []


class Helped(ContinuousBatching):
    """Calls what looks like a misspelling, so it is none."""

    def order_waiting(self, waiting: Any, now: float) -> Any:
        return sorted(waiting, key=lambda request: self.repeated(request))

    def repeated(self, request: Any) -> int:
        return int(request.num_prompt_tokens)


def test_a_helper_that_the_class_calls_is_no_mistake() -> None:
    assert misspelt(Helped) == []
    assert misspelt(bearing(ContinuousBatching, repeated=does_nothing)) == [("repeated", "repeats")]


def test_nothing_that_is_built_in_looks_misspelt() -> None:
    found = {one.name: misspelt(one.load()) for one in load_plugins()[0].components() if isinstance(one.load(), type)}
    assert len(found) > 15 and not any(found.values()), found


class Plugin:
    """Brings one class, now or when it is used."""

    def __init__(self, target: Any) -> None:
        self.target = target

    @hookimpl
    def llmkit_register(self, registry: Registry) -> None:
        registry.add_scheduler("mine", self.target)


Lazy = bearing(ContinuousBatching, victm=does_nothing)


@pytest.mark.parametrize("target", [Lazy, "tests.plugins.test_spelling:Lazy"])
def test_a_plugin_with_a_near_miss_is_warned_of(target: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        component: Component = load_plugins([Plugin(target)])[0].get("scheduler", "mine")
        assert component.load() is Lazy
    (record,) = caplog.records
    says = "scheduler 'mine' of the given plugin Plugin: Mine.victm overrides nothing; did you mean 'victim'?"
    assert record.getMessage() == says


@pytest.mark.parametrize("target", [dict, lambda settings: None, "collections:OrderedDict"])
def test_a_class_of_another_contract_is_refused(target: Any) -> None:
    component = load_plugins([Plugin(target)])[0].get("scheduler", "mine")
    says = r"^scheduler 'mine' of the given plugin Plugin is no subclass of llmkit\.Scheduler$"
    with pytest.raises(PluginError, match=says):
        component.load()


class Unfinished(Scheduler):
    def schedul(self, queue: RequestQueue, step: SchedulingStep) -> None:
        """Meant to be `schedule`, which is abstract."""


def test_a_class_that_lacks_methods_is_refused() -> None:
    says = r"^scheduler 'mine' of the given plugin Plugin lacks schedule; Unfinished\.schedul overrides nothing; "
    with pytest.raises(PluginError, match=says):
        load_plugins([Plugin(Unfinished)])[0].get("scheduler", "mine").load()


class Forgetful(ContinuousBatching):
    def __init__(self) -> None:
        """Meant to take `settings`."""


def test_a_class_that_takes_other_arguments_is_refused() -> None:
    says = (
        r"^scheduler 'mine' of the given plugin Plugin cannot be made by Forgetful\(settings\): too many positional arg"
    )
    with pytest.raises(PluginError, match=says):
        load_plugins([Plugin(Forgetful)])[0].get("scheduler", "mine").load()


def test_the_kit_refuses_it() -> None:
    with pytest.raises(AssertionError, match=r"^Mine\.victm overrides nothing; did you mean 'victim'\?$"):
        check_scheduler(Lazy, seeds=())
    with pytest.raises(AssertionError, match=r"^Mine\.trucate overrides nothing; did you mean 'truncate'\?$"):
        check_cache(bearing(PagedCache, trucate=does_nothing), seeds=())
