"""The radix tree finds what the hash table finds, block for block; and its shape is that of the sequences in it."""

from random import Random
from typing import Any

import pytest

from llmkit.interfaces.cache import CacheSpec
from llmkit.types import Request, SamplingParams
from llmkit_caches.paged import PagedCache, PagedSettings
from llmkit_caches.radix import RadixCache, RadixSettings

SIZE = 2


def request(name: str, tokens: list[int], tenant: str = "") -> Request:
    return Request(name, tokens, SamplingParams(), tenant=tenant)


def operate(random: Random, cache: Any, requests: list[Request]) -> Any:
    """One random operation, and all that can be seen of it."""
    one = random.choice(requests)
    reach = len(cache.block_table(one)) * SIZE
    die = random.random()
    if die < 0.5:
        cache.allocate(one, min(max(reach, cache.match(one)) + random.randint(1, 8), one.num_tokens))
    elif die < 0.8:
        cache.commit(one, min(reach, one.num_tokens))
    elif die < 0.9:
        cache.truncate(one, random.randint(0, one.num_tokens))
    else:
        cache.free(one)
    cache.check()
    return cache.stats(), list(cache.block_table(one)), [cache.match(other) for other in requests]


@pytest.mark.parametrize("eviction", ["lru", "lfu", "fifo"])
def test_tree_and_table_are_the_same_cache(eviction: str) -> None:
    num_found = 0
    for seed in range(15):
        spec = CacheSpec(24, SIZE)
        options = {"eviction": eviction}
        caches = PagedCache(PagedSettings(**options), spec), RadixCache(RadixSettings(**options), spec)  # type: ignore
        random = Random(seed)
        requests = [
            request(
                str(n), random.choices((0, 1), weights=(4, 1), k=random.randint(1, 30)), random.choice(("", "", "b"))
            )
            for n in range(8)
        ]
        draws = Random(seed), Random(seed)
        for number in range(200):
            table, tree = (operate(draw, cache, requests) for draw, cache in zip(draws, caches, strict=True))
            assert table == tree, f"seed {seed}, operation {number}"
            num_found += sum(tree[2])
    assert num_found > 20000


def compute(cache: RadixCache, name: str, tokens: list[int]) -> None:
    one = request(name, tokens)
    assert cache.allocate(one, len(tokens))
    cache.commit(one, len(tokens))
    cache.free(one)
    cache.check()


def runs(cache: RadixCache) -> list[Any]:
    """The tree of the first tenant: each run's tokens with what branches off."""

    def of(node: Any) -> Any:
        return (node.token_ids, sorted(of(child) for child in node.children.values()))

    (root,) = cache._index._roots.values()  # type: ignore[attr-defined]
    return sorted(of(child) for child in root.children.values())


def test_a_run_is_split_where_a_sequence_leaves_it_and_only_there() -> None:
    cache = RadixCache(RadixSettings(), CacheSpec(40, SIZE))
    compute(cache, "a", [0, 0, 1, 1, 2, 2, 3, 3])
    assert runs(cache) == [([0, 0, 1, 1, 2, 2, 3, 3], [])], "one sequence is one run"
    compute(cache, "b", [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    assert runs(cache) == [([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [])], "what goes on extends it"
    compute(cache, "c", [0, 0, 1, 1, 9, 9])
    assert runs(cache) == [([0, 0, 1, 1], [([2, 2, 3, 3, 4, 4], []), ([9, 9], [])])]
    compute(cache, "d", [0, 0, 7, 7])
    compute(cache, "e", [5, 5])
    inner = ([1, 1], [([2, 2, 3, 3, 4, 4], []), ([9, 9], [])])
    assert runs(cache) == [([0, 0], [inner, ([7, 7], [])]), ([5, 5], [])]
    assert cache.match(request("f", [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0])) == 10


def test_eviction_shortens_runs_from_their_ends() -> None:
    cache = RadixCache(RadixSettings(), CacheSpec(6, SIZE))
    compute(cache, "a", [0, 0, 1, 1, 2, 2, 3, 3])
    compute(cache, "b", [0, 0, 1, 1, 9, 9, 8, 8])
    assert runs(cache) == [([0, 0, 1, 1], [([2, 2, 3, 3], []), ([9, 9, 8, 8], [])])]
    compute(cache, "c", [5, 5, 6, 6])
    assert runs(cache) == [([0, 0, 1, 1], [([9, 9, 8, 8], [])]), ([5, 5, 6, 6], [])], (
        "the run nobody wanted for longest"
    )
    compute(cache, "d", [4, 4, 3, 3, 2, 2])
    assert runs(cache) == [([0, 0], []), ([4, 4, 3, 3, 2, 2], []), ([5, 5, 6, 6], [])]


@pytest.mark.parametrize(
    "breakage",
    [
        lambda index: index._roots.clear(),
        lambda index: index._roots[""].run.append(index._of_block[0]),
        lambda index: setattr(index._of_block[0], "at", 3),
        lambda index: index._of_block[0].node.token_ids.append(7),
        lambda index: index._roots[""].children.update({(8, 8): index._of_block[0].node}),
        lambda index: setattr(index._of_block[0].node, "tenant", "other"),
        lambda index: setattr(index._of_block[0].node, "parent", None),
    ],
)
def test_broken_trees_are_noticed(breakage: Any) -> None:
    cache = RadixCache(RadixSettings(), CacheSpec(6, SIZE))
    compute(cache, "a", [0, 0, 1, 1, 2, 2, 3, 3])
    breakage(cache._index)
    with pytest.raises(AssertionError):
        cache.check()
