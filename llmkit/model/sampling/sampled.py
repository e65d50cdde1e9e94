"""What one sampling step chose. Everything but the token ids reaches the host only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from llmkit.model.sampling.logprobs import LogprobTensors, to_host
from llmkit.model.sampling.transfer import HostCopy
from llmkit.types import TokenLogprobs

NOTHING_TO_CHOOSE = "no token can be chosen: the logits are NaN or infinite, or every token is masked out"


class Sampled:
    """Result of `Sampler.sample`; row numbers are rows of the logits it was given.

    `token_ids` int64 [R] stays on the device and is a valid id in every row, also in failed ones.
    """

    def __init__(
        self,
        token_ids: Tensor,
        evidence: Tensor,
        logprobs: LogprobTensors | None = None,
        logprob_rows: Sequence[int] = (),
        tops: Sequence[int] = (),
        on_host: Callable[[], tuple[Tensor, Tensor]] | None = None,
        reasons: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        """`evidence` [R] is finite in the rows that had something to choose from; `reasons` say why some had not.

        `on_host` waits for both on the host; without it they are copied here.
        """
        self.token_ids = token_ids
        self._on_host = on_host or _copied(token_ids, evidence)
        self._logprobs = None if logprobs is None else [HostCopy(tensor) for tensor in logprobs]
        self._logprob_rows = logprob_rows
        self._tops = tops
        self._reasons = reasons

    @classmethod
    def at_once(cls, results: Tensor, num_rows: int) -> Sampled:
        """Of the first rows in what `DeviceSampler` leaves, int64 [2, >= num_rows], by a single copy."""
        copy = HostCopy(results)

        def on_host() -> tuple[Tensor, Tensor]:
            ids, bits = copy.get()[:, :num_rows]
            return ids, bits.view(torch.float64)

        return cls(results[0, :num_rows], results[1, :num_rows].view(torch.float64), on_host=on_host)

    def tolist(self) -> list[int]:
        """The token ids on the host; waits for this step only, not for work launched after it."""
        ids: list[int] = self._on_host()[0].tolist()
        return ids

    @cached_property
    def logprobs(self) -> dict[int, TokenLogprobs]:
        """Of the sampled token and the most likely ones, for rows whose request asked; raw model distribution."""
        if self._logprobs is None:
            return {}
        rows = to_host(LogprobTensors(*(copy.get() for copy in self._logprobs)), list(self._tops))
        return dict(zip(self._logprob_rows, rows, strict=True))

    @cached_property
    def errors(self) -> dict[int, str]:
        """One line for every row that had nothing to choose from; its token must not be used."""
        usable = self._on_host()[1].isfinite()
        if bool(usable.all()):
            return {}
        failed = [row for row, fine in enumerate(usable.tolist()) if not fine]
        return {row: self._reasons.get(row, NOTHING_TO_CHOOSE) for row in failed}


def _copied(token_ids: Tensor, evidence: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    ids, values = HostCopy(token_ids), HostCopy(evidence)
    return lambda: (ids.get(), values.get())
