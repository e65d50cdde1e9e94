"""What a KV entry is on an executor without a model: a tag that says which tokens it stands for, and where.

Tokens are a hash of the tags a row attends to, so they show any slip in the bookkeeping.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Tag = tuple[int, int]
"""(64-bit hash of all tokens up to and with its own, position)."""

_MASK = (1 << 64) - 1


def extend(digest: int, token: int) -> int:
    """Digest of a prefix that is one `token` longer (a 64-bit multiply and shift hash)."""
    digest = (digest ^ (token + 1)) * 0x9E3779B97F4A7C15 & _MASK
    return digest ^ digest >> 29


def digests_of(token_ids: Iterable[int]) -> list[int]:
    """Digest of every non-empty prefix."""
    digest, digests = 0, []
    for token in token_ids:  # `extend`, without a call for each token
        digest = (digest ^ (token + 1)) * 0x9E3779B97F4A7C15 & _MASK
        digest ^= digest >> 29
        digests.append(digest)
    return digests


def tags_of(token_ids: Sequence[int]) -> list[Tag]:
    """The tag of every token."""
    return list(zip(digests_of(token_ids), range(len(token_ids)), strict=True))


def sample(seed: int, digest: int, vocab_size: int) -> int:
    """The token that follows a prefix of that digest."""
    return (extend(digest, seed) >> 8) % vocab_size


def next_token(seed: int, prefix: Sequence[int], vocab_size: int) -> int:
    """The token that follows `prefix`: a pure function of seed and content."""
    return sample(seed, digests_of(prefix)[-1], vocab_size)
