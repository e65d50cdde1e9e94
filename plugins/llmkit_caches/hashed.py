"""Cached blocks found by hash and compared by content: one entry a block, chained to the one before it.

Equal parent and equal tokens mean an equal whole, so comparing one block compares everything before it too, and equal
hashes are harmless.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmkit import CacheSpec, EvictionPolicy, Request
from llmkit_caches.index import CachedBlock, PrefixIndex

HashFunction = Callable[[int, tuple[int, ...]], int]
"""Hash of a prefix, from its parent's hash and the tokens of its last block."""


def chained_hash(parent: int, token_ids: tuple[int, ...]) -> int:
    """Python's hash of integers: fast, the same in every process. It may collide, since content is compared."""
    return hash((parent, token_ids))


@dataclass(slots=True, eq=False)
class HashedBlock(CachedBlock):
    """`token_ids` of one block behind `parent`. The root of a tenant has none, and the tenant's name for tokens."""

    parent: HashedBlock | None
    key: int
    token_ids: tuple[int, ...]
    num_children: int = 0


class HashIndex(PrefixIndex[HashedBlock]):
    """A table from chained hash to the blocks that have it."""

    def __init__(self, spec: CacheSpec, policy: EvictionPolicy, hash_function: HashFunction = chained_hash) -> None:
        super().__init__(spec, policy)
        self._hash = hash_function
        self._roots: dict[tuple[int, ...], HashedBlock] = {}
        self._by_key: dict[int, list[HashedBlock]] = {}

    def _extend(self, request: Request, found: list[HashedBlock], limit: int) -> None:
        size = self._block_size
        parent = found[-1] if found else self._roots.get(_salt(request))
        while parent is not None and len(found) < limit:
            token_ids = tuple(request.token_ids[len(found) * size : (len(found) + 1) * size])
            parent = self._behind(parent, self._hash(parent.key, token_ids), token_ids)
            if parent is not None:
                found.append(parent)

    def _get_or_add(self, request: Request, parent: HashedBlock | None, token_ids: tuple[int, ...]) -> HashedBlock:
        parent = parent or self._root(request)
        key = self._hash(parent.key, token_ids)
        cached = self._behind(parent, key, token_ids)
        if cached is None:
            cached = HashedBlock(parent, key, token_ids, published_at=self._tick())
            self._by_key.setdefault(key, []).append(cached)
            parent.num_children += 1
        return cached

    def _behind(self, parent: HashedBlock, key: int, token_ids: tuple[int, ...]) -> HashedBlock | None:
        for cached in self._by_key.get(key, ()):
            if cached.parent is parent and cached.token_ids == token_ids:
                return cached
        return None

    def _root(self, request: Request) -> HashedBlock:
        """The empty prefix of the request's tenant: whoever has another one shares nothing."""
        salt = _salt(request)
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = HashedBlock(None, self._hash(0, salt), salt)
        return root

    def _remove(self, cached: HashedBlock) -> HashedBlock | None:
        parent, bucket = cached.parent, self._by_key[cached.key]
        assert parent is not None
        bucket.remove(cached)
        if not bucket:
            del self._by_key[cached.key]
        parent.num_children -= 1
        if parent.parent is not None:
            return parent
        if not parent.num_children:
            del self._roots[parent.token_ids]
        return None

    def _is_last(self, cached: HashedBlock) -> bool:
        return not cached.num_children

    def _parents(self) -> dict[HashedBlock, HashedBlock | None]:
        size, roots = self._block_size, {}
        parents: dict[HashedBlock, HashedBlock | None] = {}
        counts: dict[HashedBlock, int] = {}
        for key, bucket in self._by_key.items():
            for cached in bucket:
                parent = cached.parent
                assert cached.key == key and parent is not None and len(cached.token_ids) == size
                counts[parent] = counts.get(parent, 0) + 1
                if parent.parent is None:
                    roots[parent.token_ids], parents[cached] = parent, None
                else:
                    parents[cached] = parent
        assert roots == self._roots, "a tenant's root is missing, or one without blocks is remembered"
        assert counts == {parent: parent.num_children for parent in counts}, "children are miscounted"
        return parents


def _salt(request: Request) -> tuple[int, ...]:
    return tuple(map(ord, request.tenant))
