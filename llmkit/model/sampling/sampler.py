"""The batched sampler: per-slot settings, and one step from logits to tokens.

Order of operations, per row: logit bias; masks (allowed, bad, and end tokens before `min_tokens`); penalties
(repetition, then frequency and presence); the request's own functions; temperature; top-k; top-p; min-p; draw. Up to
the temperature that is vLLM's order but for the functions, from there on transformers'. Rows that ask for nothing pay
for nothing: the host knows every row's parameters, so an all-greedy batch is one argmax, and plain temperature one
softmax and one sum. On an NVIDIA GPU plain rows and all draws are those of `device_sampler`, so that a CUDA graph may
choose them without a different outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmkit.model.sampling.draw import block_size_for, draw, most_likely
from llmkit.model.sampling.edits import SlotEdits
from llmkit.model.sampling.logprobs import compute_logprobs, to_host
from llmkit.model.sampling.noise import noise_key, uniforms
from llmkit.model.sampling.nucleus import draw_filtered
from llmkit.model.sampling.plan import Draws, Group, Plan, Planner, Slot
from llmkit.model.sampling.sampled import Sampled
from llmkit.model.sampling.transfer import to_device
from llmkit.types import SamplingParams, TokenLogprobs


class Sampler:
    """Chooses one token per row, in any batch and row order the same.

    A row's token depends on its logits, parameters, seed and position only. torch's random state is never used.
    `eos_token_ids` end a request unless it ignores them; here they only matter to `min_tokens`.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device, eos_token_ids: frozenset[int]) -> None:
        self._vocab_size = vocab_size
        self._block_size = block_size_for(vocab_size)
        self._width = -(-vocab_size // self._block_size) * self._block_size
        self._device = device
        self._eos_token_ids = eos_token_ids
        self.on_device = device_sampler(vocab_size, max_num_seqs, device)
        self._slots: list[Slot | None] = [None] * max_num_seqs
        self._with_min_tokens: set[int] = set()
        self._planner = Planner(vocab_size, self._width, device)
        self._plan: Plan | None = None
        self._planned_for: tuple[list[int], list[int]] = ([], [])
        self._reasons: dict[int, str] = {}

    def set_slot(self, slot: int, params: SamplingParams, seed: int, num_prompt_tokens: int) -> None:
        """A request enters `slot`: replaces all that was known of the slot.

        `seed` is the request's own, below 2**64. Raises RequestError if `params` names a token outside the vocabulary.
        """
        edits = SlotEdits.of(params, self._vocab_size, self._eos_token_ids, self._device)
        state = self._slots[slot] = Slot(params, noise_key(seed), num_prompt_tokens, edits)
        if self.on_device is not None:
            temperature = 0.0 if state.is_greedy else params.temperature
            self.on_device.set_slot(slot, temperature, state.key, params.top_k, params.top_p, params.min_p)
        (self._with_min_tokens.add if params.min_tokens else self._with_min_tokens.discard)(slot)
        self._plan = None

    def sample(self, logits: Tensor, slots: list[int], positions: list[int], tokens: Tensor) -> Sampled:
        """Choose a token for every row of `logits` [R, V], any float dtype, left unchanged.

        `slots[i]` is row i's slot, `positions[i]` the index its token will take in the sequence, `tokens` integer
        [max_num_seqs, max_len] the history by slot, valid below `positions[i]`. Nothing is read back from the device.
        """
        logits = logits.contiguous()
        if self._runs_kernels(logits) and self.is_plain(slots, positions):
            return Sampled.at_once(self._choose(logits, slots, positions), len(slots))
        plan, self._reasons = self._plan_for(slots, positions), {}
        parts = [(group, most_likely(self._rows(group, logits, positions, tokens))) for group in plan.greedy]
        parts += [(draws.group, self._draw(draws, logits, positions, tokens)) for draws in plan.draws]
        token_ids, evidence = parts[0][1] if len(parts) == 1 else _merge(parts, len(slots), self._device)
        if not plan.logprob_rows:
            return Sampled(token_ids, evidence, reasons=self._reasons)
        logprobs = compute_logprobs(logits[plan.logprob_index], token_ids[plan.logprob_index], max(plan.tops))
        return Sampled(token_ids, evidence, logprobs, plan.logprob_rows, plan.tops, reasons=self._reasons)

    def is_plain(self, slots: list[int], positions: list[int]) -> bool:
        """Whether rows ask for no more than greedy tokens or draws at a temperature: no edits, filters or logprobs."""
        plan = self._plan_for(slots, positions)
        is_unfiltered = all(draws.filters is None and draws.group.is_plain for draws in plan.draws)
        return is_unfiltered and not plan.logprob_rows and all(group.is_plain for group in plan.greedy)

    def prompt_logprobs(self, logits: Tensor, token_ids: Tensor, top: int) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of `token_ids` [N] under raw `logits` [N, V], and each row's `top` most likely tokens."""
        return tuple(to_host(compute_logprobs(logits, token_ids.long(), top), [top] * len(token_ids)))

    def _plan_for(self, slots: list[int], positions: list[int]) -> Plan:
        early = self._early_rows(slots, positions) if self._with_min_tokens else []
        if self._plan is None or self._planned_for != (slots, early):
            states = [self._state(slot) for slot in slots]
            self._plan = self._planner.build(slots, states, [row in early for row in range(len(slots))])
            self._planned_for = (list(slots), early)
        return self._plan

    def _early_rows(self, slots: list[int], positions: list[int]) -> list[int]:
        return [
            row
            for row, slot in enumerate(slots)
            if slot in self._with_min_tokens and self._state(slot).is_early(positions[row])
        ]

    def _state(self, slot: int) -> Slot:
        state = self._slots[slot]
        if state is None:
            raise ValueError(f"slot {slot} is sampled before a request entered it")
        return state

    def _draw(self, draws: Draws, logits: Tensor, positions: Sequence[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self._runs_kernels(logits):
            rows = self._rows(draws.group, logits, positions, tokens)
            slots = [self._planned_for[0][row] for row in draws.group.rows]
            ends = [positions[row] for row in draws.group.rows]
            results = self._choose(rows, slots, ends, draws.filters is not None)
            return results[0], results[1].view(torch.float64)
        here = np.array([positions[row] for row in draws.group.rows], dtype=np.uint64)
        noise = to_device(torch.from_numpy(uniforms(draws.keys, here)), self._device)
        rows = self._rows(draws.group, logits, positions, tokens)
        if not draws.group.is_plain:
            scaled = rows.div_(draws.temperature)
        elif self._width == self._vocab_size:
            scaled = rows / draws.temperature
        else:
            scaled = self._padded(rows)
            torch.div(rows, draws.temperature, out=scaled[:, : self._vocab_size])
        if draws.filters is not None:
            return draw_filtered(scaled, draws.filters, noise[0])
        return draw(scaled, noise, self._block_size, self._vocab_size)

    def _runs_kernels(self, logits: Tensor) -> bool:
        return self.on_device is not None and logits.dtype is not torch.float64

    def _choose(self, logits: Tensor, slots: list[int], positions: list[int], is_filtered: bool = False) -> Tensor:
        places = to_device([slots, positions], self._device, torch.int64)
        choose = self.on_device.choose_filtered if is_filtered else self.on_device.choose
        results: Tensor = choose(logits, places[0], places[1])
        return results

    def _rows(self, group: Group, logits: Tensor, positions: Sequence[int], tokens: Tensor) -> Tensor:
        """The group's logits: [G, V] as they came, or an edited copy [G, W]."""
        rows = logits[group.index]
        if group.is_plain:
            return rows
        edited = self._padded(rows)
        edited[:, : self._vocab_size] = rows
        if group.edits is not None:
            group.edits.apply(edited)
        known = [positions[row] for row in group.rows]
        if group.penalties is not None:
            group.penalties.apply(edited, known, tokens)
        if group.processors is not None:
            self._reasons |= group.processors.apply(edited, self._vocab_size, known, tokens)
        return edited

    def _padded(self, rows: Tensor) -> Tensor:
        """Room for `rows` in whole blocks: [len(rows), W], -inf beyond the vocabulary, the rest not yet written."""
        dtype = torch.promote_types(rows.dtype, torch.float32)
        room = torch.empty(len(rows), self._width, dtype=dtype, device=rows.device)
        if self._width > self._vocab_size:
            room[:, self._vocab_size :] = -torch.inf
        return room


def device_sampler(vocab_size: int, max_num_seqs: int, device: torch.device) -> Any:
    """The `DeviceSampler` of all slots and the spare one behind them; None where its kernels cannot run."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from llmkit.model.sampling.device_sampler import DeviceSampler

    return DeviceSampler(vocab_size, max_num_seqs + 1, device)


def _merge(
    parts: Sequence[tuple[Group, tuple[Tensor, Tensor]]], num_rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids int64 [R] and evidence float64 [R] of the whole batch, in row order."""
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    evidence = torch.empty(num_rows, dtype=torch.float64, device=device)
    for group, (ids, values) in parts:
        token_ids[group.index] = ids
        evidence[group.index] = values.to(torch.float64)
    return token_ids, evidence
