"""What one sampling step chose. Everything but the token ids reaches the host only when asked for."""

from __future__ import annotations

from torch import Tensor

from llmkit.types import TokenLogprobs


class Sampled:
    """Result of `Sampler.sample`; row numbers are rows of the logits it was given."""

    def __init__(self, token_ids: Tensor, failed: Tensor) -> None:
        self.token_ids = token_ids
        self._failed = failed

    @property
    def logprobs(self) -> dict[int, TokenLogprobs]:
        """Of the sampled token, for rows whose request asked for them."""
        return {}

    @property
    def errors(self) -> dict[int, str]:
        """One line for every row that had nothing to choose from; its token id is 0 and must not be used."""
        return {row: "no usable logits" for row, failed in enumerate(self._failed.tolist()) if failed}
