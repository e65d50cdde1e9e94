"""How many keys of decoding rows lie in blocks that other rows have too, as block tables say."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def num_repeated_keys(
    block_tables: NDArray[np.int32], slots: NDArray[np.int64], num_keys: NDArray[np.int64], block_size: int
) -> int:
    """So many keys at least are in whole blocks that another row has in the same place, one row each not counted.

    `block_tables` [S, W] by slot; `num_keys` [R] counts those of the rows in `slots` [R]. Rows that have one block in
    common are taken to have those before it in common, so it looks at columns 0, 1, 3, 7, ... only.
    """
    num_blocks, column, num_seen, repeated = num_keys // block_size, 0, 0, 0
    while column < block_tables.shape[1]:
        held = block_tables[slots[num_blocks > column], column]
        number = len(held) - len(set(held.tolist()))
        if not number:
            break
        repeated += number * (column + 1 - num_seen)
        num_seen, column = column + 1, 2 * column + 1
    return repeated * block_size
