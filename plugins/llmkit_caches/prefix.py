"""Which full blocks can be found again: a tree of prefixes, looked up by hash and compared by content.

A prefix is whole blocks of tokens from the start of a tenant's sequence; its parent is the same without the last block.
Equal parent and equal last tokens mean an equal whole, so comparing one block compares everything before it too.

Whoever uses a prefix uses its parent, so what stands behind an unused prefix is unused as well: unused ones can always
go, the outermost first, and no prefix ever stands without its parent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import pairwise

from llmkit import Request
from llmkit_caches.eviction import EvictionPolicy

HashFunction = Callable[[int, tuple[int, ...]], int]
"""Hash of a prefix, from its parent's hash and the tokens of its last block."""


def chained_hash(parent: int, token_ids: tuple[int, ...]) -> int:
    """Python's hash of integers: fast, the same in every process. It may collide, since content is compared."""
    return hash((parent, token_ids))


@dataclass(slots=True, eq=False)
class Prefix:
    """`token_ids` of one block behind `parent`, and the blocks that hold their KV.

    There are several while requests use copies that they computed side by side; none once it is evicted. The root of
    a tenant has no parent, no block, and the tenant's name for tokens. `ticket` is its place in the queue for eviction.
    """

    parent: Prefix | None
    key: int
    token_ids: tuple[int, ...]
    blocks: list[int] = field(default_factory=list)
    published_at: int = 0
    released_at: int = 0
    num_uses: int = 0
    num_children: int = 0
    is_idle: bool = False
    ticket: int = 0


class PrefixIndex:
    """Published prefixes of every tenant. It is told which are used and which are not; it counts no references."""

    def __init__(self, block_size: int, policy: EvictionPolicy, hash_function: HashFunction) -> None:
        self.num_idle = 0
        self._block_size = block_size
        self._policy = policy
        self._hash = hash_function
        self._roots: dict[tuple[int, ...], Prefix] = {}
        self._by_key: dict[int, list[Prefix]] = {}
        self._of_block: dict[int, Prefix] = {}
        self._queue: list[tuple[tuple[int, ...], int, Prefix]] = []
        self._time = 0
        self._last: tuple[Request | None, list[Prefix]] = None, []

    def find(self, request: Request) -> Sequence[Prefix]:
        """The longest known prefixes of `request`, shortest first, that leave its last token to be computed.

        None of a request that wants log-probabilities of its prompt, because all of that must run. Asking again for
        the same request costs only what has changed since.
        """
        if request.sampling_params.prompt_logprobs is not None:
            return ()
        size, limit = self._block_size, (request.num_tokens - 1) // self._block_size
        found = self._last[1] if self._last[0] is request else []
        while found and not found[-1].blocks:
            found.pop()
        prefix = found[-1] if found else self._roots.get(_salt(request))
        while prefix is not None and len(found) < limit:
            start = len(found) * size
            prefix = self._child(prefix, tuple(request.token_ids[start : start + size]))
            if prefix is not None:
                found.append(prefix)
        self._last = request, found
        return found

    def forget(self) -> None:
        """Drop what `find` remembers of the last request: its answer has been used."""
        self._last = None, []

    def publish(self, request: Request, table: Sequence[int], first: int, end: int) -> list[int]:
        """Make blocks `first` to `end` of a request findable, whose KV is valid. Returns blocks this made redundant."""
        redundant: list[int] = []
        size = self._block_size
        prefix = self._of_block[table[first - 1]] if first else self._root(request)
        for index in range(first, end):
            token_ids = tuple(request.token_ids[index * size : (index + 1) * size])
            prefix = self._child(prefix, token_ids) or self._add(prefix, token_ids)
            if prefix.is_idle:
                redundant += prefix.blocks
                for block in prefix.blocks:
                    del self._of_block[block]
                prefix.blocks.clear()
            self.use(prefix)
            prefix.blocks.append(table[index])
            self._of_block[table[index]] = prefix
        return redundant

    def use(self, prefix: Prefix) -> None:
        """One more request uses `prefix`; it cannot be evicted until all its blocks are released."""
        prefix.num_uses += 1
        if prefix.is_idle:
            prefix.is_idle, prefix.ticket = False, 0
            self.num_idle -= 1

    def release(self, block: int) -> bool:
        """Nobody uses `block` any more. Whether it is kept: a published one is, unless there is another copy."""
        prefix = self._of_block.get(block)
        if prefix is None:
            return False
        if len(prefix.blocks) > 1:
            prefix.blocks.remove(block)
            del self._of_block[block]
            return False
        prefix.is_idle, prefix.released_at = True, self._tick()
        self.num_idle += 1
        if not prefix.num_children:
            self._queue_up(prefix)
        return True

    def evict(self) -> int:
        """Forget the unused prefix that the policy ranks lowest, and return its block. There must be one."""
        while True:
            _, ticket, prefix = heappop(self._queue)
            if prefix.ticket == ticket:
                break
        parent, bucket = prefix.parent, self._by_key[prefix.key]
        assert parent is not None
        bucket.remove(prefix)
        if not bucket:
            del self._by_key[prefix.key]
        block = prefix.blocks.pop()
        del self._of_block[block]
        prefix.is_idle, prefix.ticket = False, 0
        self.num_idle -= 1
        parent.num_children -= 1
        if not parent.num_children:
            if parent.parent is None:
                del self._roots[parent.token_ids]
            elif parent.is_idle:
                self._queue_up(parent)
        return block

    def check(self, ref_counts: Sequence[int], tables: Iterable[tuple[Sequence[int], int]]) -> None:
        """Raise AssertionError where the books are wrong.

        `ref_counts` says how many tables hold each block; each of `tables` comes with how many of it are published.
        """
        for table, num_published in tables:
            chain = [self._of_block.get(block) for block in table]
            assert all(chain[:num_published]), f"{table}: not all of {num_published} blocks can be found"
            assert not any(chain[num_published:]), f"{table}: blocks beyond {num_published} can be found"
            for parent, prefix in pairwise(chain[:num_published]):
                assert prefix is not None and prefix.parent is parent, f"{table}: prefixes are not in a row"
        self._check_prefixes(ref_counts)

    def _check_prefixes(self, ref_counts: Sequence[int]) -> None:
        prefixes = [prefix for bucket in self._by_key.values() for prefix in bucket]
        of_block = {block: prefix for prefix in prefixes for block in prefix.blocks}
        assert of_block == self._of_block, "a block stands for a prefix that does not know it"
        children: dict[Prefix, int] = {}
        for prefix in prefixes:
            counts = [ref_counts[block] for block in prefix.blocks]
            assert counts, "an evicted prefix can still be found"
            assert prefix.is_idle == (counts == [0]), f"blocks {prefix.blocks} are used {counts} times"
            assert prefix.is_idle or all(counts), f"blocks {prefix.blocks}: an unused copy is kept"
            assert prefix.parent is not None and len(prefix.token_ids) == self._block_size
            assert prefix.parent.parent is None or prefix.parent.blocks, "a prefix stands without its parent"
            assert prefix.is_idle or not prefix.parent.is_idle, "a used prefix stands behind an unused one"
            children[prefix.parent] = children.get(prefix.parent, 0) + 1
        assert set(self._roots.values()) == {prefix for prefix in children if prefix.parent is None}, "tenants' roots"
        assert self.num_idle == sum(prefix.is_idle for prefix in prefixes), "unused prefixes are miscounted"
        queued = {prefix for _, ticket, prefix in self._queue if prefix.ticket == ticket}
        for prefix in (*prefixes, *self._roots.values()):
            assert prefix.num_children == children.get(prefix, 0), "children are miscounted"
            can_go = prefix.is_idle and not prefix.num_children
            assert (prefix in queued) == can_go, "what can be evicted is not what waits for it"

    def _root(self, request: Request) -> Prefix:
        """The empty prefix of the request's tenant: whoever has another one shares nothing."""
        salt = _salt(request)
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Prefix(None, self._hash(0, salt), salt)
        return root

    def _child(self, parent: Prefix, token_ids: tuple[int, ...]) -> Prefix | None:
        for prefix in self._by_key.get(self._hash(parent.key, token_ids), ()):
            if prefix.parent is parent and prefix.token_ids == token_ids:
                return prefix
        return None

    def _add(self, parent: Prefix, token_ids: tuple[int, ...]) -> Prefix:
        prefix = Prefix(parent, self._hash(parent.key, token_ids), token_ids, published_at=self._tick())
        self._by_key.setdefault(prefix.key, []).append(prefix)
        parent.num_children += 1
        return prefix

    def _queue_up(self, prefix: Prefix) -> None:
        """It can go from now on. Entries of those that have been used since are swept out before they pile up."""
        prefix.ticket = self._tick()
        heappush(self._queue, (self._policy.rank(prefix), prefix.ticket, prefix))
        if len(self._queue) > 2 * self.num_idle + 64:
            self._queue = [entry for entry in self._queue if entry[2].ticket == entry[1]]
            heapify(self._queue)

    def _tick(self) -> int:
        self._time += 1
        return self._time


def _salt(request: Request) -> tuple[int, ...]:
    return tuple(map(ord, request.tenant))
