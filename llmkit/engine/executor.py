"""Runs plans on a model: packs inputs, one forward pass for all rows, samples, and keeps every token on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from llmkit.engine.decode_graph import DecodeGraphs, is_decode
from llmkit.engine.device_timer import DeviceTimer
from llmkit.engine.grouped_attention import GroupedBatch, backends_of
from llmkit.engine.inputs import InputBuilder, PackedInputs, slots_and_starts
from llmkit.engine.repeats import num_repeated_keys
from llmkit.interfaces.attention import AttentionBackend, AttentionBatch
from llmkit.model.network import Network
from llmkit.model.sampling import Sampled, Sampler
from llmkit.model.sampling.transfer import to_device
from llmkit.types import Admission, BlockCopies, ScheduledRequest, StepPlan, StepResult, TokenLogprobs


@dataclass(slots=True)
class _Launched:
    """A step on the device; `wait` reads it back."""

    step_id: int
    num_rows: int
    sampling_rows: tuple[int, ...]
    sampled: Sampled | None
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]]
    timer: DeviceTimer | None = None

    def wait(self) -> StepResult:
        token_ids = [-1] * self.num_rows
        if self.sampled is None:
            seconds = None if self.timer is None else self.timer.take()
            return StepResult(self.step_id, token_ids, {}, self.prompt_logprobs, {}, seconds)
        rows = self.sampling_rows
        if len(rows) == self.num_rows:
            token_ids = self.sampled.tolist()
        else:
            for row, token_id in zip(rows, self.sampled.tolist(), strict=True):
                token_ids[row] = token_id
        logprobs = {rows[index]: entry for index, entry in self.sampled.logprobs.items()}
        errors = {rows[index]: message for index, message in self.sampled.errors.items()}
        seconds = None if self.timer is None else self.timer.take()
        return StepResult(self.step_id, token_ids, logprobs, self.prompt_logprobs, errors, seconds)


class TorchExecutor:
    """Implements `Executor`. The token table [max_num_seqs + 1, max_model_len + 1] holds prompts and sampled tokens by
    slot, so a step's input ids are read on the device and the next step can be launched before the host knows them."""

    def __init__(
        self,
        network: Network,
        backend: AttentionBackend,
        sampler: Sampler,
        inputs: InputBuilder,
        tokens: torch.Tensor,
        graphs: DecodeGraphs | None = None,
        timer: DeviceTimer | None = None,
        more_inputs: Sequence[InputBuilder] = (),
    ) -> None:
        """`more_inputs` pack the tables of further groups of layers; `backend` is a `GroupedAttention` then."""
        self.network = network
        self.backend = backend
        self.sampler = sampler
        self.inputs = inputs
        self.tokens = tokens
        self.graphs = graphs
        self.timer = timer
        self.more_inputs = tuple(more_inputs)
        self._backends = backends_of(backend)
        self._counts_repeats = backend.reads_once(tokens.numel())
        self._admissions: dict[int, Admission] = {}
        self._with_prompt_logprobs: set[int] = set()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> _Launched:
        """Enqueue a step. Nothing here waits for the device."""
        if self.timer is None:
            return self._enqueue(plan)
        with self.timer.timing():
            launched = self._enqueue(plan)
        launched.timer = self.timer
        return launched

    def _enqueue(self, plan: StepPlan) -> _Launched:
        if plan.copies is not None:
            self._copy(plan.copies)
        for admission in plan.admissions:
            self._admit(admission)
        self.inputs.apply(plan)
        for number, inputs in enumerate(self.more_inputs, 1):
            inputs.apply(plan.of_group(number))
        if self.graphs is not None:
            self.graphs.apply(plan)
            if self.graphs.takes(plan) and not self._prompt_logprob_rows(plan):
                return self._replay(plan, self.graphs)
        packed = self.inputs.build(plan)
        device = self.tokens.device
        token_slots, positions = _to(packed.token_slots, device), _to(packed.positions, device)
        batch = self._batch(packed, positions)
        self.backend.plan(self._grouped(batch, plan) if self.more_inputs else batch)
        prompt_rows = self._prompt_logprob_rows(plan)
        wanted = [packed.logit_tokens, *(np.arange(first, first + n) for _, first, n in prompt_rows)]
        rows = np.concatenate(wanted)
        if not len(rows):
            rows = packed.query_start_loc[1:2].astype(np.int64) - 1
        logits = self.network(self.tokens[token_slots, positions], positions, _to(rows, device))
        num_sampling = len(packed.sampling_rows)
        sampled = self._sample(logits[:num_sampling], packed) if num_sampling else None
        prompt_logprobs = self._prompt_logprobs(logits[num_sampling:], plan, prompt_rows)
        return _Launched(plan.step_id, len(plan.scheduled), packed.sampling_rows, sampled, prompt_logprobs)

    def _copy(self, copies: BlockCopies) -> None:
        """Blocks to the host, to other blocks, and back from the host, in the same queue as the steps."""
        if copies.saves:
            self.backend.save_blocks(*zip(*copies.saves, strict=True))
        for backend, forks in zip(self._backends, (copies.forks, *copies.more_forks), strict=False):
            if forks:
                backend.copy_blocks(forks)
        if copies.restores:
            self.backend.restore_blocks(*zip(*copies.restores, strict=True))

    def _replay(self, plan: StepPlan, graphs: DecodeGraphs) -> _Launched:
        """A step in one graph; if rows ask for more than plain tokens, all are sampled from its logits."""
        decoded, rows = graphs.run(plan), plan.scheduled
        sampling = range(len(rows)) if is_decode(rows) else [index for index, row in enumerate(rows) if row.samples]
        if not sampling:
            return _Launched(plan.step_id, len(rows), (), None, {})
        logits, results = decoded.logits, decoded.results
        if len(sampling) < len(rows):
            chosen = to_device(sampling, self.tokens.device, torch.int64)
            logits, results = logits[chosen], results[:, chosen]
        slots, ends = self._places(rows, sampling)
        is_plain = self.sampler.is_plain(slots, ends)
        sampled = Sampled.at_once(results, len(slots)) if is_plain else self._choose(logits, slots, ends)
        return _Launched(plan.step_id, len(rows), tuple(sampling), sampled, {})

    def _places(self, rows: Sequence[ScheduledRequest], sampling: Sequence[int]) -> tuple[list[int], list[int]]:
        """Slots of `sampling` rows, and where their next tokens belong."""
        if is_decode(rows):
            slots, starts = slots_and_starts(rows)
            return slots.tolist(), (starts + 1).tolist()
        chosen = [rows[index] for index in sampling]
        return [row.slot for row in chosen], [row.start + row.num_tokens for row in chosen]

    def _admit(self, admission: Admission) -> None:
        slot, token_ids = admission.slot, admission.token_ids
        self._admissions[slot] = admission
        wants = admission.sampling_params.prompt_logprobs is not None
        (self._with_prompt_logprobs.add if wants else self._with_prompt_logprobs.discard)(slot)
        tokens = torch.from_numpy(np.fromiter(token_ids, np.int64, len(token_ids)))
        self.tokens[slot, : len(tokens)] = to_device(tokens, self.tokens.device)
        self.sampler.set_slot(slot, admission.sampling_params, admission.seed, admission.num_prompt_tokens)

    def _batch(self, packed: PackedInputs, positions: torch.Tensor) -> AttentionBatch:
        device = self.tokens.device
        return AttentionBatch(
            query_start_loc=_to(packed.query_start_loc, device),
            seq_lens=_to(packed.seq_lens, device),
            positions=positions,
            block_table=_to(packed.block_table, device),
            slot_mapping=_to(packed.slot_mapping, device),
            max_query_len=max(packed.query_lens),
            max_seq_len=int(packed.seq_lens.max()),
            query_lens=packed.query_lens,
            host_seq_lens=tuple(packed.seq_lens.tolist()),
            fresh_blocks=_to(packed.fresh_blocks, device) if len(packed.fresh_blocks) else None,
            num_repeated_keys=self._num_repeated(packed) if self._counts_repeats else 0,
        )

    def _grouped(self, batch: AttentionBatch, plan: StepPlan) -> GroupedBatch:
        """`batch`, and the same rows in the tables of every further group."""
        others, device = [], self.tokens.device
        for inputs in self.more_inputs:
            packed = inputs.build(plan)
            fresh = _to(packed.fresh_blocks, device) if len(packed.fresh_blocks) else None
            table, slots = _to(packed.block_table, device), _to(packed.slot_mapping, device)
            others.append(replace(batch, block_table=table, slot_mapping=slots, fresh_blocks=fresh))
        return GroupedBatch.of([batch, *others])

    def _num_repeated(self, packed: PackedInputs) -> int:
        """Keys that rows with one new token repeat."""
        single = np.array(packed.query_lens) == 1
        num_keys = packed.seq_lens[single].astype(np.int64) - 1
        return num_repeated_keys(self.inputs.block_tables, packed.row_slots[single], num_keys, self.inputs.block_size)

    def _sample(self, logits: torch.Tensor, packed: PackedInputs) -> Sampled:
        """Choose tokens and write them behind the sequences they belong to."""
        rows = list(packed.sampling_rows)
        return self._choose(logits, packed.row_slots[rows].tolist(), packed.seq_lens[rows].tolist())

    def _choose(self, logits: torch.Tensor, slots: list[int], ends: list[int]) -> Sampled:
        sampled = self.sampler.sample(logits, slots, ends, self.tokens)
        device = self.tokens.device
        self.tokens[to_device(slots, device), to_device(ends, device)] = sampled.token_ids
        return sampled

    def _prompt_logprob_rows(self, plan: StepPlan) -> list[tuple[int, int, int]]:
        """(row, first packed token, number of tokens) of rows whose prompt's log-probabilities were asked for."""
        wanted: list[tuple[int, int, int]] = []
        first = 0
        if not self._with_prompt_logprobs:
            return wanted
        for index, row in enumerate(plan.scheduled):
            if row.slot in self._with_prompt_logprobs:
                num_prompt_tokens = self._admissions[row.slot].num_prompt_tokens
                num = min(row.start + row.num_tokens, num_prompt_tokens - 1) - row.start
                if num > 0:
                    wanted.append((index, first, num))
            first += row.num_tokens
        return wanted

    def _prompt_logprobs(
        self, logits: torch.Tensor, plan: StepPlan, rows: list[tuple[int, int, int]]
    ) -> dict[int, tuple[TokenLogprobs, ...]]:
        out, done = {}, 0
        for index, _, num in rows:
            row = plan.scheduled[index]
            targets = self.tokens[row.slot, row.start + 1 : row.start + 1 + num]
            top = self._admissions[row.slot].sampling_params.prompt_logprobs or 0
            out[index] = self.sampler.prompt_logprobs(logits[done : done + num], targets, top)
            done += num
        return out


def _to(array: NDArray[np.int64] | NDArray[np.int32], device: torch.device) -> torch.Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(array)), device)
