"""Built-in caches; registered by an entry point like anyone else's."""

from llmkit import Registry, hookimpl
from llmkit_caches.contiguous import ContiguousCache
from llmkit_caches.eviction import POLICIES
from llmkit_caches.paged import PagedCache
from llmkit_caches.radix import RadixCache


@hookimpl
def llmkit_register(registry: Registry) -> None:
    for name, policy in POLICIES.items():
        registry.add_eviction(name, policy)
    registry.add_cache("paged", PagedCache)
    registry.add_cache("radix", RadixCache)
    registry.add_cache("contiguous", ContiguousCache)
