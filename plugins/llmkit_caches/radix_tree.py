"""Cached blocks in a radix tree: runs of blocks that belong together, branching where sequences do (Zheng et al. 2024).

A run is compared with a prompt in one go, without hashing. It is split where a newcomer leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmkit import CacheSpec, EvictionPolicy, Request
from llmkit_caches.index import CachedBlock, PrefixIndex


@dataclass(slots=True, eq=False)
class RadixBlock(CachedBlock):
    """The block at place `at` of the run `node`."""

    node: RadixNode
    at: int


@dataclass(slots=True, eq=False)
class RadixNode:
    """A run: `token_ids` of all its `run`, and what branches off behind its end, by the first block's tokens.

    The root of a tenant has no parent and an empty run.
    """

    parent: RadixNode | None
    tenant: str
    token_ids: list[int] = field(default_factory=list)
    run: list[RadixBlock] = field(default_factory=list)
    children: dict[tuple[int, ...], RadixNode] = field(default_factory=dict)


class RadixIndex(PrefixIndex[RadixBlock]):
    """A tree for each tenant."""

    def __init__(self, spec: CacheSpec, policy: EvictionPolicy) -> None:
        super().__init__(spec, policy)
        self._roots: dict[str, RadixNode] = {}

    def _extend(self, request: Request, found: list[RadixBlock], limit: int) -> None:
        size, token_ids = self._block_size, request.token_ids
        node = found[-1].node if found else self._roots.get(request.tenant)
        at = found[-1].at + 1 if found else 0
        while node is not None and len(found) < limit:
            start = len(found) * size
            if at < len(node.run):
                num = min(len(node.run) - at, limit - len(found))
                num_equal = self._num_equal(node.token_ids, at * size, token_ids, start, num)
                found += node.run[at : at + num_equal]
                if num_equal < num:
                    return
            node, at = node.children.get(tuple(token_ids[len(found) * size : (len(found) + 1) * size])), 0

    def _num_equal(self, ours: list[int], here: int, theirs: list[int], there: int, num: int) -> int:
        """Leading blocks, of `num`, in which two lists agree from those places on."""
        size = self._block_size
        if ours[here : here + num * size] == theirs[there : there + num * size]:
            return num
        low, high = 0, num  # the first `low` are equal, the first `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            first, last = low * size, middle * size
            is_equal = ours[here + first : here + last] == theirs[there + first : there + last]
            low, high = (middle, high) if is_equal else (low, middle)
        return low

    def _get_or_add(self, request: Request, parent: RadixBlock | None, token_ids: tuple[int, ...]) -> RadixBlock:
        return self._child(request, parent, token_ids) or self._add(request, parent, token_ids)

    def _child(self, request: Request, parent: RadixBlock | None, token_ids: tuple[int, ...]) -> RadixBlock | None:
        node = parent.node if parent is not None else self._roots.get(request.tenant)
        at = parent.at + 1 if parent is not None else 0
        if node is None:
            return None
        if at < len(node.run):
            is_equal = node.token_ids[at * self._block_size : (at + 1) * self._block_size] == list(token_ids)
            return node.run[at] if is_equal else None
        child = node.children.get(token_ids)
        return child.run[0] if child is not None else None

    def _add(self, request: Request, parent: RadixBlock | None, token_ids: tuple[int, ...]) -> RadixBlock:
        if parent is None:
            node = self._roots.setdefault(request.tenant, RadixNode(None, request.tenant))
        else:
            node = parent.node
            if parent.at + 1 < len(node.run):
                self._split(node, parent.at + 1)
        if node.parent is None or node.children:
            child = RadixNode(node, request.tenant)
            node.children[token_ids] = child
            node = child
        cached = RadixBlock(node, len(node.run), published_at=self._tick())
        node.run.append(cached)
        node.token_ids += token_ids
        return cached

    def _split(self, node: RadixNode, at: int) -> None:
        """Leave the first `at` blocks of a run in it, and put the others into one behind it."""
        size = self._block_size
        behind = RadixNode(node, node.tenant, node.token_ids[at * size :], node.run[at:], node.children)
        del node.token_ids[at * size :], node.run[at:]
        for place, cached in enumerate(behind.run):
            cached.node, cached.at = behind, place
        for child in behind.children.values():
            child.parent = behind
        node.children = {tuple(behind.token_ids[:size]): behind}

    def _remove(self, cached: RadixBlock) -> RadixBlock | None:
        node, size = cached.node, self._block_size
        token_ids = tuple(node.token_ids[-size:])
        node.run.pop()
        del node.token_ids[-size:]
        if node.run:
            return node.run[-1]
        parent = node.parent
        assert parent is not None
        del parent.children[token_ids]
        if parent.parent is not None:
            return parent.run[-1]
        if not parent.children:
            del self._roots[parent.tenant]
        return None

    def _is_last(self, cached: RadixBlock) -> bool:
        return cached.at + 1 == len(cached.node.run) and not cached.node.children

    def _parents(self) -> dict[RadixBlock, RadixBlock | None]:
        parents: dict[RadixBlock, RadixBlock | None] = {}
        for tenant, root in self._roots.items():
            assert root.parent is None and not root.run and root.children, f"the root of {tenant!r} is not a root"
            pending: list[tuple[RadixNode, RadixBlock | None]] = [(root, None)]
            while pending:
                node, before = pending.pop()
                assert node.tenant == tenant and len(node.token_ids) == len(node.run) * self._block_size, "a bad run"
                for place, cached in enumerate(node.run):
                    assert cached.node is node and cached.at == place, "a block does not know its place in a run"
                    parents[cached] = before
                    before = cached
                for token_ids, child in node.children.items():
                    assert child.parent is node and child.run, "an empty run branches off"
                    assert tuple(child.token_ids[: self._block_size]) == token_ids, "a run begins otherwise"
                    pending.append((child, before))
        return parents
