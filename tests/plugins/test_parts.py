"""Parts: what an option of a component chooses among the registered ones. Eviction policies are the first kind."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit import ConfigError, EvictionPolicy, PluginError, Registry, hookimpl, load_plugins
from llmkit.cli.completion import candidates
from llmkit.config import choose
from llmkit.interfaces.cache import CacheSpec
from llmkit.testing import check_cache
from llmkit.types import Request, SamplingParams


class MostRecentlyUsed(EvictionPolicy):
    """What was just used goes first."""

    def rank(self, cached: Any) -> tuple[int, ...]:
        return (-cached.released_at,)


class Foreign:
    """Brings a policy, and does not know which caches there are."""

    @hookimpl
    def llmkit_register(self, registry: Registry) -> None:
        registry.add_eviction("mru", MostRecentlyUsed)


def build(name: str, plugins: list[object], eviction: str, num_blocks: int = 4) -> Any:
    registry, _ = load_plugins(plugins)
    choice = choose(registry, "cache", {"name": name, "eviction": eviction})
    return registry.get("cache", name).load()(choice.settings, CacheSpec(num_blocks, 1))


@pytest.mark.parametrize("name", ["paged", "radix"])
@pytest.mark.parametrize(("eviction", "evicted"), [("mru", "c"), ("lru", "a")])
def test_a_foreign_policy_is_an_option_of_every_cache_that_evicts(name: str, eviction: str, evicted: str) -> None:
    cache = build(name, [Foreign()], eviction)
    for word in ("a", "b", "c", "12"):
        request = Request(word, list(map(ord, word)), SamplingParams())
        assert cache.allocate(request, len(word))
        cache.commit(request, len(word)), cache.free(request)
    gone = [word for word in "abc" if not cache.match(Request("?", [ord(word), 0], SamplingParams()))]
    assert gone == [evicted]


@pytest.mark.parametrize("name", ["paged", "radix"])
def test_a_foreign_policy_conforms_in_walks(name: str) -> None:
    registry, _ = load_plugins([Foreign()])
    settings = registry.get("cache", name).settings
    cache = type("Cache", (registry.get("cache", name).load(),), {"Settings": settings})
    assert check_cache(cache, options={"eviction": "mru"}, seeds=range(12, 15)).num_cached_tokens > 20


def test_names_that_are_not_registered_are_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"cache\.eviction='mru': Input should be 'fifo', 'lfu' or 'lru'"):
        build("paged", [], "mru")
    with pytest.raises(ConfigError, match="'fifo', 'lfu', 'lru' or 'mru'"):
        build("paged", [Foreign()], "mra")
    with pytest.raises(PluginError, match="eviction 'mru' is registered twice"):
        load_plugins([Foreign(), Foreign()])


def test_parts_are_listed_and_completed_but_are_no_group() -> None:
    registry, _ = load_plugins([Foreign()])
    found = {one.name: one.doc for one in registry.components() if one.kind == "eviction"}
    assert set(found) == {"lru", "lfu", "fifo", "mru"} and found["mru"] == "What was just used goes first."
    (paged,) = (one for one in registry.components() if one.name == "paged")
    assert paged.settings is registry.get("cache", "paged").settings, "one class, however often it is asked for"
    assert candidates("llmkit run cache.eviction=l") == ["cache.eviction=lfu", "cache.eviction=lru"]
    assert candidates("llmkit run evic") == []


def test_components_without_parts_are_left_alone() -> None:
    registry, _ = load_plugins([Foreign()])
    component = registry.get("scheduler", "continuous")
    assert component.settings is component.load().Settings
