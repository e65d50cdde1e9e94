"""A cache under audit: every operation is checked against the contract and against a book of what was handed out.

The book knows nothing of how the allocator works. It drives both the random walk and the hypothesis machine.
"""

from __future__ import annotations

from llmkit.engine.grouped_cache import fork_in_groups, groups_of
from llmkit.interfaces.cache import CacheAllocator
from llmkit.types import BlockCopy, Request


class Ledger:
    """Runs operations on `cache` and raises AssertionError on the first broken promise."""

    def __init__(self, cache: CacheAllocator) -> None:
        self.cache = cache
        self.groups = groups_of(cache)
        self.block_size = cache.spec.block_size
        self.tables: dict[str, list[int]] = {}
        self.released: dict[str, int] = {}
        self.num_valid: dict[str, int] = {}
        self._requests: dict[str, Request] = {}
        self._contents: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.num_refusals = 0
        self.num_forks = 0

    def table(self, request: Request) -> list[int]:
        """The request's blocks as the book has them."""
        return self.tables.get(request.request_id, [])

    def match(self, request: Request) -> int:
        """Asking for reusable tokens changes nothing and never offers the whole request."""
        before = self.cache.stats(), self.cache.census()
        num_cached = self.cache.match(request)
        num_tokens = request.num_tokens
        most = 0 if request.sampling_params.prompt_logprobs is not None else num_tokens - 1
        assert 0 <= num_cached <= most, f"match says {num_cached} of {num_tokens} tokens are cached, at most {most} may"
        assert (self.cache.stats(), self.cache.census()) == before, "match changed the cache"
        assert self.cache.reuses_prefixes or not num_cached, (
            f"match says {num_cached}, but nothing is said to be reused"
        )
        return num_cached

    def allocate(self, request: Request, upto: int) -> bool:
        """All or nothing; what is held already stays in place; an empty pool never refuses what fits it."""
        held, before = self.table(request), self._snapshot()
        num_cached, num_unowned = 0 if held else self.match(request), self.cache.stats().num_unowned_blocks
        num_missing = self.cache.num_missing_blocks(request, upto)
        is_granted = self.cache.allocate(request, upto)
        table = list(self.cache.block_table(request))
        what = f"allocate({request.request_id}, {upto}) of blocks {held}"
        if is_granted:
            reach = len(table) * self.block_size
            assert reach >= upto, f"{what} was granted, but {table} reaches {reach} tokens"
            assert table[: len(held)] == held, f"{what} moved blocks: {table}"
            num_taken = num_unowned - self.cache.stats().num_unowned_blocks
            assert num_taken >= num_missing, f"{what} took {num_taken} blocks, but {num_missing} were missing"
            self.tables[request.request_id], self._requests[request.request_id] = table, request
            self._take_released(request, num_cached)
            self._check_reuse(request, len(held), num_cached)
            self.num_valid[request.request_id] = max(num_cached, self.num_valid.get(request.request_id, 0))
        else:
            self.num_refusals += 1
            assert table == held and self._snapshot() == before, f"{what} was refused, but left {table}"
            assert upto > len(held) * self.block_size, f"{what} was refused, though they cover it"
            assert any(self.tables.values()), f"{what} was refused by an empty pool of {self.cache.spec}"
        self.check()
        return is_granted

    def fork(self, request: Request, parent: Request, more: int) -> bool:
        """Start a request on all that it can have of another, and reserve for `more` tokens; whether that came about.

        What is full is shared and the rest its own, the first of it copied; all or nothing, in every group of layers.
        """
        num_tokens = self._num_common(request, parent) if all(group.forks for group in self.groups) else 0
        if not num_tokens or num_tokens >= request.max_num_tokens:
            return False
        before, owned = self._snapshot(), [group.census().keys() for group in self.groups]
        upto = min(num_tokens + more, request.max_num_tokens)
        forked = fork_in_groups(self.cache, request, parent, num_tokens, upto)
        table, num_full = list(self.cache.block_table(request)), num_tokens // self.block_size
        what = f"fork({request.request_id}, {parent.request_id}, {num_tokens}, {upto})"
        if forked is None:
            assert self._snapshot() == before, f"{what} was refused, but left {table}"
            return False
        self.tables[request.request_id], self._requests[request.request_id] = table, request
        self._take_released(request, num_tokens)
        for group, taken, copies in zip(self.groups, owned, forked, strict=True):
            theirs, mine = list(group.block_table(parent)), list(group.block_table(request))
            assert not taken & {*mine[num_full:]}, f"{what} of {theirs} takes blocks of others: {mine}"
            assert len(mine) * self.block_size >= upto, f"{what} was granted, but {mine} is too short"
            self._check_forked(what, theirs, mine, num_tokens, group.num_released_blocks(request), copies)
        for block in table[num_full:]:
            self._contents.pop(block, None)
        self._contents |= {block: (request.tenant, tuple(request.token_ids[:num_tokens])) for _, block, _ in forked[0]}
        self.num_valid[request.request_id] = num_tokens
        self.num_forks += 1
        self.check()
        return True

    def _check_forked(
        self, what: str, theirs: list[int], mine: list[int], num_tokens: int, first: int, copies: tuple[BlockCopy, ...]
    ) -> None:
        """Of tables of one group: from block `first` on what is full is shared, and what is left over is copied."""
        num_full, num_left = divmod(num_tokens, self.block_size)
        assert mine[first:num_full] == theirs[first:num_full], f"{what} of {theirs} shares {mine}"
        wanted = [(theirs[num_full], mine[num_full], num_left)] if num_left else []
        assert list(copies) == wanted, f"{what} of {theirs} as {mine} copies {copies}"

    def _num_common(self, request: Request, parent: Request) -> int:
        """Tokens on which `request` can be forked from `parent`; its last one is always left."""
        if self.table(request) or not self.table(parent) or request.tenant != parent.tenant:
            return 0
        most = min(self.num_valid.get(parent.request_id, 0), request.num_tokens - 1)
        pairs = zip(request.token_ids[:most], parent.token_ids, strict=False)
        num_common = next((at for at, (one, other) in enumerate(pairs) if one != other), most)
        is_held = all(
            group.num_released_blocks(parent) <= group.spec.num_hidden_blocks(num_common) for group in self.groups
        )
        return num_common if is_held else 0

    def commit(self, request: Request, num_computed_tokens: int) -> None:
        """Publishing computed tokens moves no block of anybody, but may release those that are seen no more."""
        for index, block in enumerate(self.table(request)):
            end = min((index + 1) * self.block_size, num_computed_tokens)
            if index >= self.num_released(request):
                self._contents[block] = request.tenant, tuple(request.token_ids[:end])
        self.cache.commit(request, num_computed_tokens)
        self.num_valid[request.request_id] = max(num_computed_tokens, self.num_valid.get(request.request_id, 0))
        self._take_released(request, num_computed_tokens)
        self.check()

    def num_released(self, request: Request) -> int:
        """How many of its first blocks it has given back, as the book has it."""
        return self.released.get(request.request_id, 0)

    def _take_released(self, request: Request, start: int) -> None:
        """Note what a request, whose queries to come stand at `start` or beyond, has released."""
        before, now = self.num_released(request), self.cache.num_released_blocks(request)
        most = max(before, self.cache.spec.num_hidden_blocks(start))
        assert before <= now <= most, f"{request.request_id} released {now} blocks at {start}, {before} before"
        if now:
            self.released[request.request_id] = now
            self.tables[request.request_id][:now] = self.cache.block_table(request)[:now]

    def truncate(self, request: Request, upto: int) -> None:
        """Blocks below `upto` stay, those beyond may go; a second call changes nothing. Released ones go last."""
        held = self.table(request)
        keep = min(len(held), -(-upto // self.block_size))
        self.cache.truncate(request, upto)
        table = list(self.cache.block_table(request))
        what = f"truncate({request.request_id}, {upto}) of blocks {held}"
        is_kept = len(table) >= keep or not (table or keep > self.num_released(request))
        assert table == held[: len(table)] and is_kept, f"{what} left {table}"
        if not table:
            self.released.pop(request.request_id, None)
        reach = len(table) * self.block_size
        self.num_valid[request.request_id] = min(reach, self.num_valid.get(request.request_id, 0))
        self.tables[request.request_id], self._requests[request.request_id] = table, request
        self.check()
        before = self._snapshot()
        self.cache.truncate(request, upto)
        assert self._snapshot() == before, f"{what} did more when repeated"

    def free(self, request: Request) -> None:
        """Everything comes back; freeing again, or freeing what holds nothing, is harmless."""
        self.cache.free(request)
        assert not len(self.cache.block_table(request)), f"{request.request_id} was freed, but keeps a block table"
        self.tables.pop(request.request_id, None)
        self.released.pop(request.request_id, None)
        self.num_valid.pop(request.request_id, None)
        self.check()
        before = self._snapshot()
        self.cache.free(request)
        assert self._snapshot() == before, f"freeing {request.request_id} twice did something"

    def check(self) -> None:
        """Allocator and book agree on who owns what, and nobody shares a block whose tokens differ."""
        self.cache.check()
        owners: dict[int, set[str]] = {}
        for request_id, table in self.tables.items():
            held = table[self.released.get(request_id, 0) :]
            assert len(set(held)) == len(held), f"{request_id} holds a block twice: {table}"
            for block in held:
                owners.setdefault(block, set()).add(request_id)
            stands = list(self.cache.block_table(self._requests[request_id]))
            assert stands == table, f"the table of {request_id} became {stands}, was {table}"
        census = {block: set(ids) for block, ids in self.cache.census().items()}
        assert census == owners, f"census {census}, handed out {owners}"
        for block, ids in owners.items():
            self._check_sharing(block, ids)

    def _check_sharing(self, block: int, ids: set[str]) -> None:
        prefixes = set()
        for request_id in ids:
            end = (self.tables[request_id].index(block) + 1) * self.block_size
            prefixes.add((end, tuple(self._requests[request_id].token_ids[:end])))
        assert len(prefixes) == 1, f"block {block} is shared by {sorted(ids)}, whose tokens up to it differ"
        tenants = {self._requests[request_id].tenant for request_id in ids}
        assert len(tenants) == 1, f"block {block} is shared by tenants {sorted(tenants)}"

    def _check_reuse(self, request: Request, num_held: int, num_cached: int) -> None:
        """What `match` promised stands in the blocks, committed for this tenant; the other new ones hold nothing."""
        for index, block in enumerate(self.table(request)[num_held:], num_held):
            end = min((index + 1) * self.block_size, num_cached)
            if index < self.num_released(request):
                continue
            if index * self.block_size >= num_cached:
                self._contents.pop(block, None)
                continue
            tenant, token_ids = self._contents.get(block, (None, ()))
            is_right = (tenant, token_ids[:end]) == (request.tenant, tuple(request.token_ids[:end]))
            assert is_right, f"{request.request_id} reuses block {block}, which holds {token_ids} of {tenant!r}"

    def _snapshot(self) -> tuple[object, ...]:
        tables = {name: list(self.cache.block_table(request)) for name, request in self._requests.items()}
        return tables, [(group.stats(), group.census()) for group in self.groups]
