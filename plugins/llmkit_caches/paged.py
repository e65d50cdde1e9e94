"""Paged KV cache: block tables over a free list, with prefix caching by hash (Kwon et al. 2023, "PagedAttention")."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from llmkit import CacheSpec
from llmkit import Settings as AnySettings
from llmkit_caches.eviction import EvictionSettings
from llmkit_caches.hashed import HashIndex, chained_hash
from llmkit_caches.sharing import SharingCache


class PagedSettings(EvictionSettings):
    """Options of the paged cache."""

    prefix: bool = Field(True, description="reuse the KV of equal beginnings, within a tenant")

    @model_validator(mode="after")
    def _evicts_what_it_keeps(self) -> Self:
        if not self.prefix and self.eviction != type(self).model_fields["eviction"].default:
            raise ValueError(f"eviction={self.eviction} does nothing with prefix=off, which keeps no unused block")
        return self


class PagedCache(SharingCache):
    """Block tables over a free list; full blocks are found again by hash."""

    Settings: ClassVar[type[AnySettings]] = PagedSettings
    hash_function = staticmethod(chained_hash)

    def __init__(self, settings: PagedSettings, spec: CacheSpec) -> None:
        index = HashIndex(spec, settings.policy(), self.hash_function)
        super().__init__(settings, spec, index, settings.prefix)
