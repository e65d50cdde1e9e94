"""The default run: llmkit's `generate` against `transformers.generate`, cell by cell, in the same process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from rich.console import Console

from llmkit.errors import LlmkitError
from llmkit.metrics.grid import Cell, Timing, compare_tokens, summarise_grid, timing
from llmkit.metrics.summary import SCHEMA_VERSION
from llmkit.report.grid import print_grid, reason_to_keep, write_grid
from llmkit.report.progress import Progress
from llmkit.types import SamplingParams
from llmkit.workload.interrupt import Interrupt, deferred_interrupt
from llmkit.workload.naive import NaiveBaseline
from llmkit.workload.protocol import ModelBounds, RunContext, RunOutcome, Target
from llmkit.workload.requests import check_length, check_one_sample
from llmkit.workload.served import provenance, title
from llmkit.workload.settings import GridSettings

WARM_UP_TOKENS = 4


class GridWorkload:
    """Both arms get the same prompts, greedy decoding, and go on after the end-of-text token.

    A round visits every cell and measures llmkit, then the baseline: A B A B ... over the whole run, so that a machine
    that drifts drifts under both. Prompts differ in every cell and round, so no cache can know them.
    """

    def __init__(self, settings: GridSettings) -> None:
        self.settings = settings
        self.cells = [
            Cell(prompt_len, batch_size, max_tokens)
            for batch_size, prompt_len, max_tokens in product(
                sorted(settings.batch_size), sorted(settings.prompt_len), sorted(settings.max_tokens)
            )
        ]

    def check(self, sampling: SamplingParams, bounds: ModelBounds | None) -> None:
        """See `Workload`."""
        check_one_sample("grid", sampling)
        if bounds is not None:
            longest = max(cell.prompt_len + cell.max_tokens for cell in self.cells)
            check_length("grid", longest, bounds.max_model_len)

    def run(self, target: Target, context: RunContext) -> RunOutcome:
        """See `Workload.run`."""
        limits = target.engine.limits
        self.check(context.sampling, ModelBounds(limits.vocab_size, limits.max_model_len))
        naive = NaiveBaseline(target.naive_model(), target.engine.clock)
        started_at = target.engine.clock.now()
        interrupted = False
        total = self.settings.repeats * len(self.cells)
        with deferred_interrupt() as interrupt, Progress("grid", total, "cells") as progress:
            try:
                for _ in self._measure(target, naive, interrupt):
                    progress.advance()
            except KeyboardInterrupt:
                interrupted = True
            interrupted = interrupted or interrupt.is_requested
        result = {
            "schema_version": SCHEMA_VERSION,
            "interrupted": interrupted,
            "title": title("grid", context.labels),
            "duration": target.engine.clock.now() - started_at,
            **summarise_grid(self.cells),
            **provenance("grid", self.settings, context),
            "baseline": {"name": "transformers.generate, one prompt after the other", **naive.describe()},
        }
        console, plots_dir = context.console or Console(), context.plots_dir
        print_grid(console, result)
        if plots_dir is not None and (reason := reason_to_keep(plots_dir, result)):
            console.print(f"{plots_dir} stays as it is: {reason}", style="yellow", highlight=False, markup=False)
            plots_dir = None
        files = write_grid(context.run_dir, result, plots_dir, context.config_text)
        return RunOutcome(result, tuple(files), interrupted)

    def _measure(self, target: Target, naive: NaiveBaseline, interrupt: Interrupt) -> Iterator[Cell]:
        """Measure round after round, one cell at a time, within the time limit; a round once begun is finished."""
        clock, limit = target.engine.clock, self.settings.time_limit
        started_at = clock.now()
        self._warm_up(target, naive, interrupt)
        for number in range(self.settings.repeats):
            round_started_at = clock.now()
            for cell in self.cells:
                if interrupt.is_requested:
                    return
                self._measure_cell(target, naive, cell, number)
                yield cell
            now = clock.now()
            if now - started_at + (now - round_started_at) > limit:
                return

    def _warm_up(self, target: Target, naive: NaiveBaseline, interrupt: Interrupt) -> None:
        """Every shape of prompt and batch once, a few tokens long, on both arms and unmeasured."""
        shapes = sorted({(cell.prompt_len, cell.batch_size) for cell in self.cells})
        for prompt_len, batch_size in shapes:
            if interrupt.is_requested:
                return
            max_tokens = min(WARM_UP_TOKENS, *self.settings.max_tokens)
            prompts = self._prompts(target, Cell(prompt_len, batch_size, max_tokens), self.settings.repeats)
            _optimized(target, prompts, max_tokens)
            naive.generate(prompts[:1], max_tokens)

    def _measure_cell(self, target: Target, naive: NaiveBaseline, cell: Cell, number: int) -> None:
        prompts, clock = self._prompts(target, cell, number), target.engine.clock
        ours, optimized = _optimized(target, prompts, cell.max_tokens)
        started_at = clock.now()
        theirs, finished_at = naive.generate(prompts, cell.max_tokens)
        cell.optimized.append(optimized)
        cell.naive.append(timing(started_at, finished_at))
        if number == 0:
            compare_tokens(cell, ours, theirs)

    def _prompts(self, target: Target, cell: Cell, number: int) -> list[list[int]]:
        """Random token ids [batch_size][prompt_len], the same for every run with the same settings."""
        key = (self.settings.seed, number, cell.prompt_len, cell.batch_size, cell.max_tokens)
        rng = np.random.default_rng(np.random.SeedSequence(key))
        size = (cell.batch_size, cell.prompt_len)
        prompts: list[list[int]] = rng.integers(0, target.engine.limits.vocab_size, size=size).tolist()
        return prompts


def _optimized(target: Target, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[list[Any], Timing]:
    """Output token ids and timing of the whole batch submitted at once through the public call."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    clock = target.engine.clock
    started_at = clock.now()
    outputs = target.generate(prompts, params)
    ended_at = clock.now()
    problems = {output.error for output in outputs if output.error is not None}
    if problems:
        raise LlmkitError(f"a request of the grid failed: {problems.pop()}")
    finished_at = [output.metrics.finished_time or ended_at for output in outputs]
    # The call's own return counts as the end of the last request, as it does for the baseline.
    return [output.token_ids for output in outputs], timing(started_at, [*sorted(finished_at)[:-1], ended_at])
