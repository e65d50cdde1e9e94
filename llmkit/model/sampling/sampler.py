"""The batched sampler: per-slot settings, and one step from logits to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkit.model.sampling.sampled import Sampled
from llmkit.types import SamplingParams, TokenLogprobs


class Sampler:
    """Chooses one token per row. A row's token depends on its logits, parameters, seed and position only."""

    def __init__(
        self, vocab_size: int, max_num_seqs: int, device: torch.device, eos_token_ids: frozenset[int]
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self._params: list[SamplingParams | None] = [None] * max_num_seqs

    def set_slot(self, slot: int, params: SamplingParams, seed: int, num_prompt_tokens: int) -> None:
        """A request enters `slot`: replaces all that was known of the slot."""
        self._params[slot] = params

    def sample(self, logits: Tensor, slots: list[int], positions: list[int], tokens: Tensor) -> Sampled:
        """Choose a token for every row of `logits` [R, V].

        `slots[i]` is row i's slot, `positions[i]` the index its token will take in the sequence, `tokens`
        int64 [max_num_seqs, max_len] the history by slot, valid below `positions[i]`.
        """
        token_ids = logits.argmax(-1)
        best = logits.gather(-1, token_ids[:, None])[:, 0]
        return Sampled(token_ids, ~best.isfinite())

    def prompt_logprobs(self, logits: Tensor, token_ids: Tensor, top: int) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of `token_ids` [N] under `logits` [N, V], with the `top` most likely of each row."""
        values = logits.float().log_softmax(-1)
        picked = values.gather(-1, token_ids[:, None])
        ranks = (values > picked).sum(-1) + 1
        best, ids = values.topk(top, -1)
        return tuple(
            TokenLogprobs(token, value, rank, tuple(zip(row_ids, row, strict=True)))
            for token, value, rank, row_ids, row in zip(
                token_ids.tolist(), picked[:, 0].tolist(), ranks.tolist(), ids.tolist(), best.tolist(), strict=True
            )
        )
