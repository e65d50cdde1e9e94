"""Lists the tiles of new tokens that `prefill_hopper` serves, longest first, so that its programs end together."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "most"])
def list_longest_first(
    starts, lengths, tiles, rows, most,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program row: its tiles of up to QUERIES new tokens among all rows' tiles, those that see most keys first.

    `tiles` int32 [most + 1, 4]: row, first token in the batch, its place in the row, new tokens from there to the
    row's end; behind all `most` of them first of all how many there are. Rows with one new token have none. Tiles that
    see equally many keys, rounded up to whole tiles, keep the order of their rows. Rows are compared ROWS at a time.
    """
    row = tl.program_id(0)
    start = tl.load(starts + row)
    count = tl.load(starts + row + 1) - start
    number, before = tl.where(count > 1, tl.cdiv(count, QUERIES), 0), tl.load(lengths + row) - count
    for chunk in range(0, number, CHUNK):
        tile = chunk + tl.arange(0, CHUNK)
        keys = before + (tile + 1) * QUERIES
        rank = tl.zeros([CHUNK], tl.int32)
        for first in range(0, rows, ROWS):
            other = first + tl.arange(0, ROWS)
            theirs, stored = _tiles_of(starts, lengths, other, rows, QUERIES)
            # A row's tiles see more keys from one to the next: those of another row up to here do not come before.
            limit = keys[:, None] - stored[None, :] - (other < row).to(tl.int32)[None, :]
            behind = tl.minimum(tl.maximum(limit, 0) // QUERIES, theirs[None, :])
            rank += tl.sum(theirs[None, :] - behind, 1)
        at, here = tiles + 4 * rank, tile < number
        tl.store(at, row + 0 * tile, mask=here)
        tl.store(at + 1, start + tile * QUERIES, mask=here)
        tl.store(at + 2, before + tile * QUERIES, mask=here)
        tl.store(at + 3, count - tile * QUERIES, mask=here)
    if row == 0:
        total = tl.zeros([ROWS], tl.int32)
        for first in range(0, rows, ROWS):
            theirs, _ = _tiles_of(starts, lengths, first + tl.arange(0, ROWS), rows, QUERIES)
            total += theirs
        tl.store(tiles + 4 * most, tl.sum(total, 0))


@triton.jit
def _tiles_of(starts, lengths, row, rows, QUERIES: tl.constexpr):
    """How many tiles each of the rows has, and its keys before this step."""
    here = row < rows
    count = tl.load(starts + row + 1, mask=here, other=0) - tl.load(starts + row, mask=here, other=0)
    stored = tl.load(lengths + row, mask=here, other=0) - count
    return tl.where(count > 1, tl.cdiv(count, QUERIES), 0), stored
