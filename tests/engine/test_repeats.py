"""What block tables say of keys that rows have in common, and that the attention backend hears of it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from llmkit import LLM, SamplingParams
from llmkit.engine.repeats import num_repeated_keys
from llmkit.interfaces.attention import AttentionBatch
from llmkit_attention.sdpa import SdpaAttention
from tests.tiny_llm import BLOCK_SIZE, MAX_MODEL_LEN, tiny


def tables_of(rng: random.Random, num_rows: int) -> tuple[list[list[int]], list[int]]:
    """Rows that begin like one another, with numbers of whole blocks; blocks behind those are anybody's."""
    tables: list[list[int]] = []
    for row in range(num_rows):
        other = rng.choice(tables) if tables else []
        tables.append(other[: rng.choice([0, 0, 1, 2, 4, 7, 8, 12])] + [100 * row + i for i in range(16)])
    return [table[:16] for table in tables], [rng.randint(0, 15) for _ in tables]


@pytest.mark.parametrize("seed", range(20))
def test_counts_no_more_than_there_are_and_at_least_half(seed: int) -> None:
    rng = random.Random(seed)
    tables, whole = tables_of(rng, rng.choice([1, 2, 3, 9]))
    slots = rng.sample(range(len(tables) + 3), len(tables))
    by_slot = np.full((len(tables) + 3, 16), 7, dtype=np.int32)
    by_slot[slots] = tables
    num_keys = np.array([4 * blocks + rng.randint(0, 3) for blocks in whole])
    counted = num_repeated_keys(by_slot, np.array(slots), num_keys, 4)
    held = [block for table, blocks in zip(tables, whole, strict=True) for block in table[:blocks]]
    repeated = 4 * (len(held) - len(set(held)))
    assert repeated / 2 <= counted <= repeated and counted % 4 == 0


def test_a_long_prefix_of_a_power_of_two_is_counted_to_the_end() -> None:
    tables = np.tile(np.arange(40, dtype=np.int32), (5, 1))
    assert num_repeated_keys(tables, np.arange(5), np.full(5, 32 * 16 + 9), 16) == 4 * 32 * 16
    assert num_repeated_keys(tables, np.arange(5), np.full(5, 15), 16) == 0


class Listening(SdpaAttention):
    heard: list[int] = []  # noqa: RUF012
    listens = True

    def reads_once(self, num_repeated_keys: int) -> bool:
        return self.listens and num_repeated_keys > 0

    def plan(self, batch: AttentionBatch) -> None:
        self.heard.append(batch.num_repeated_keys)
        super().plan(batch)


@pytest.mark.parametrize("listens", [True, False])
def test_a_backend_that_reads_once_hears_how_much(listens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Listening, "listens", listens)
    monkeypatch.setattr(Listening, "heard", [])
    llm = LLM(tiny(), block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN, dtype="float64")
    executor = llm.engine.executor
    executor.backend.__class__ = Listening  # type: ignore[attr-defined]
    executor._counts_repeats = executor.backend.reads_once(1 << 20)  # type: ignore[attr-defined]
    prefix = [3 + i % 90 for i in range(8 * BLOCK_SIZE)]
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    llm.generate([[*prefix, 5]], params)
    assert set(Listening.heard) == {0}
    llm.generate([[*prefix, token] for token in (5, 6, 7)], params)
    assert max(Listening.heard) == (2 * len(prefix) if listens else 0)
