"""Rows that begin with the same blocks read these once: the same attention as reading them row by row.

Not collected by itself, as `flash_cases.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmkit.interfaces.attention import AttentionBatch, LayerSpec
from llmkit_attention.flash import sharing
from tests.attention.flash_cases import DEVICE, DTYPE, HEADS, TOLERANCE, OnDevice, Spoilt, layer
from tests.attention.sequences import Rows, Stored

Group = tuple[int, list[int]]
"""Keys that rows have in common, and how many each has besides, its new one included."""


class Sharing(OnDevice):
    """Reads once whatever can be read once, and tells how many tiles each row did not read."""

    depths: list[int]

    def plan(self, batch: AttentionBatch) -> None:
        super().plan(replace(batch, num_repeated_keys=1 << 40))
        found = [prefixes.depths.tolist() for prefixes in self._step.shared.values()]
        self.depths = found[0] if found else []


class Prefixed(Spoilt):
    """Sequences some of which begin with the blocks of another."""

    def store(self, name: str, num_keys: int) -> None:
        """So many keys more for `name`, put where they belong without the kernels, which are not what is tested."""
        self._grow(name, num_keys)
        sequence, block_size = self.stored[name], self.requirements.block_size
        slots = [divmod(place, block_size) for place in range(sequence.length - num_keys, sequence.length)]
        blocks, places = [sequence.blocks[number] for number, _ in slots], [place for _, place in slots]
        for number, pool in enumerate(self.backend._pools):  # type: ignore[attr-defined]
            _, key, value = self.draw(number, num_keys)
            pool[0, blocks, :, places], pool[1, blocks, :, places] = key.to(DEVICE), value.to(DEVICE)
            keys, values = sequence.layers[number]
            sequence.layers[number] = torch.cat([keys, key]), torch.cat([values, value])

    def fork(self, name: str, other: str, num_keys: int) -> None:
        """`name` begins with the first `num_keys` of `other`, whole blocks."""
        block_size, source = self.requirements.block_size, self.stored[other]
        assert num_keys % block_size == 0
        layers = [(keys[:num_keys], values[:num_keys]) for keys, values in source.layers]
        self.stored[name] = Stored(layers, source.blocks[: num_keys // block_size], num_keys)


def grown(groups: list[Group], layers: list[LayerSpec], block_size: int = 16) -> tuple[Prefixed, Rows]:
    """Sequences ready for a step of one new token each."""
    keys = sum(common + sum(own) + len(own) * block_size for common, own in groups)
    made = Prefixed(Sharing, layers, DTYPE, block_size=block_size, num_blocks=keys // block_size + 40)
    names = []
    for number, (common, own) in enumerate(groups):
        if common:
            made.store(f"prefix {number}", common)
        for row, count in enumerate(own):
            names.append(f"{number} {row}")
            if common:
                made.fork(names[-1], f"prefix {number}", common)
            if count > 1:
                made.store(names[-1], count - 1)
    return made, [(name, 1) for name in names]


def run(groups: list[Group], layers: list[LayerSpec], depths: list[int], block_size: int = 16) -> None:
    """Two steps, the second with rows in another order; the first leaves out `depths` tiles."""
    made, rows = grown(groups, layers, block_size)
    assert made.step(rows, slack=3) <= TOLERANCE
    assert made.backend.depths == depths  # type: ignore[attr-defined]
    assert made.step(rows[::-1]) <= TOLERANCE


@pytest.mark.parametrize("ratio", HEADS)
def test_shared_kv_heads(ratio: int) -> None:
    run([(512, [40, 1, 3, 17, 90])], [layer(ratio)], [8] * 5)


@pytest.mark.parametrize(("head_dim", "tile"), [(16, 64), (80, 64), (128, 64), (256, 32)])
def test_head_dimensions(head_dim: int, tile: int) -> None:
    run([(256, [5, 1, 66, 2])], [layer(4, head_dim)], [256 // tile] * 4)


@pytest.mark.parametrize(("block_size", "whole"), [(1, 5), (16, 5), (64, 6), (128, 6)])
def test_blocks_of_any_power_of_two(block_size: int, whole: int) -> None:
    """A tile is shared if all its blocks are."""
    common = {1: 383, 16: 368}.get(block_size, 384)
    run([(common, [40, 1, 70, 2])], [layer(2)], [whole] * 4, block_size)


def test_layers_that_differ_and_windows_that_share_nothing() -> None:
    layers = [layer(2), layer(4, 32, window=300), layer(2, softcap=2.0), layer(8, 256)]
    run([(320, [3, 40, 1, 9])], layers, [5] * 4)


@pytest.mark.parametrize(
    ("groups", "depths"),
    [
        ([(0, [300, 400, 280, 500])], [0] * 4),
        ([(512, [9])], [0]),
        ([(192, [9, 70])], [0] * 2),
        ([(64, [9, 1, 70, 4])], [0] * 4),
        ([(64, [9, 1, 70, 4, 3])], [1] * 5),
        ([(256, [9, 70])], [4] * 2),
        ([(0, [300]), (320, [1, 2, 3, 4]), (0, [7]), (256, [5] * 5)], [0, 5, 5, 5, 5, 0, 4, 4, 4, 4, 4]),
    ],
)
def test_rows_that_share_nothing_or_too_little_and_several_groups(groups: list[Group], depths: list[int]) -> None:
    run(groups, [layer(2)], depths)


@pytest.mark.parametrize(("ratio", "number"), [(8, 19), (6, 23)])
def test_more_rows_than_a_pack(ratio: int, number: int) -> None:
    run([(320, [1 + 13 * row % 50 for row in range(number)])], [layer(ratio)], [5] * number)


def test_rows_choose_where_most_is_saved() -> None:
    """All begin alike, some go on alike: those share all of it, the others what is left."""
    made, rows = grown([(64, [300, 200, 250, 400, 350, 270])], [layer(2)])
    made.fork("deep", "prefix 0", 64)
    made.store("deep", 384)
    for number in range(3):
        made.fork(f"deep {number}", "deep", 448)
        rows = [*rows[: 2 * number], (f"deep {number}", 1), *rows[2 * number :]]
    assert made.step(rows) <= TOLERANCE
    assert made.backend.depths == [7, 1, 7, 1, 7, 1, 1, 1, 1]  # type: ignore[attr-defined]


def test_groups_beyond_the_most_packs_read_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "MAX_PACKS", 2)
    run([(256, [1, 2]), (256, [3, 4]), (256, [5, 6])], [layer(2)], [4] * 4 + [0] * 2)


def test_packs_reach_as_far_as_all_their_rows_agree() -> None:
    """A row that forks earlier, within a tile of the others' prefix."""
    made, rows = grown([(448, [3, 1, 2, 9])], [layer(2)])
    made.fork("early", "prefix 0", 368)
    made.store("early", 100)
    assert made.step([*rows[:2], ("early", 1), *rows[2:]]) <= TOLERANCE
    assert made.backend.depths == [5] * 5  # type: ignore[attr-defined]


def test_a_row_with_copies_of_the_first_blocks_reads_for_itself() -> None:
    """It has the others' block where they are told apart, but other ones in front."""
    made, rows = grown([(320, [3, 1, 2, 9])], [layer(2)])
    copy = made.stored["0 2"]
    fresh = made._free.pop()
    for pool in made.backend._pools:  # type: ignore[attr-defined]
        pool[:, fresh] = pool[:, copy.blocks[1]]
    copy.blocks[1] = fresh
    assert made.step(rows) <= TOLERANCE
    assert made.backend.depths == [5, 5, 0, 5]  # type: ignore[attr-defined]


def test_long_prefixes_are_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "LEAST_PART", 1)
    run([(704, [3, 1, 2, 9, 5, 8]), (256, [1, 2, 3, 4])], [layer(4)], [11] * 6 + [4] * 4)


def test_beside_prompts_and_rows_of_length_zero() -> None:
    made, rows = grown([(256, [3, 1, 2, 9])], [layer(2)])
    mixed = [rows[0], ("new", 70), *rows[1:3], ("other", 2), rows[3]]
    assert made.step(mixed) <= TOLERANCE
    assert made.backend.depths == [4, 0, 4, 4, 0, 4]  # type: ignore[attr-defined]
    for name, _ in rows:
        made._grow(name, 1)
    batch, (query, key, value) = made.batch(rows), [part.clone() for part in made.draw(0, 6)]
    plan = made.backend.plan
    made.backend.plan(batch)
    wanted = made.backend.forward(0, query[1:5], key[1:5], value[1:5])
    plan(padded(batch))
    out = made.backend.forward(0, query, key, value)
    assert made.backend.depths == [0, 4, 4, 4, 4, 0]  # type: ignore[attr-defined]
    assert (out[1:5] - wanted).abs().max() <= TOLERANCE


def padded(batch: AttentionBatch) -> AttentionBatch:
    """With a row of length 0 in front and one behind, whose tables name the first row's blocks."""

    def around(part: torch.Tensor, value: int) -> torch.Tensor:
        end = torch.tensor([value], dtype=part.dtype)
        return torch.cat([end, part, end])

    return replace(
        batch,
        query_start_loc=torch.arange(len(batch.seq_lens) + 3, dtype=torch.int32),
        seq_lens=around(batch.seq_lens, 0),
        positions=around(batch.positions, 0),
        block_table=torch.cat([batch.block_table[:1], batch.block_table, batch.block_table[:1]]),
        slot_mapping=around(batch.slot_mapping, -1),
        query_lens=(1,) * (len(batch.seq_lens) + 2),
        host_seq_lens=(0, *batch.host_seq_lens, 0),
    )


def test_nan_of_a_row_stays_in_it() -> None:
    made, rows = grown([(256, [3, 70, 2, 9])], [layer(2)])
    for name, _ in rows:
        made._grow(name, 1)
    made.backend.spoil(made.stored["0 0"].blocks[-1:])  # type: ignore[attr-defined]
    batch, (query, key, value) = made.batch(rows), list(made.draw(0, 4))
    made.backend.plan(batch)
    out = made.backend.forward(0, query, key, value)
    assert out[0].isnan().all() and out[1:].isfinite().all()
