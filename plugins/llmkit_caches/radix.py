"""Radix KV cache: paged blocks whose prefixes are found in a tree (Zheng et al. 2024, "SGLang")."""

from __future__ import annotations

from typing import ClassVar

from llmkit import CacheSpec
from llmkit import Settings as AnySettings
from llmkit_caches.eviction import EvictionSettings
from llmkit_caches.radix_tree import RadixIndex
from llmkit_caches.sharing import SharingCache


class RadixSettings(EvictionSettings):
    """Options of the radix cache."""


class RadixCache(SharingCache):
    """Block tables over a free list; full blocks are found again in a radix tree of token runs."""

    Settings: ClassVar[type[AnySettings]] = RadixSettings

    def __init__(self, settings: RadixSettings, spec: CacheSpec) -> None:
        super().__init__(settings, spec, RadixIndex(spec, settings.policy()))
