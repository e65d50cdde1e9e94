"""Workloads that are played against the engine: build the requests, play them, write and show what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

from rich.console import Console

from llmkit.metrics.environment import environment
from llmkit.metrics.recorder import MetricsRecorder
from llmkit.metrics.summary import GoodputLimits, summarise
from llmkit.report.folder import write_run
from llmkit.report.progress import Progress
from llmkit.report.summary_table import print_summary
from llmkit.types import SamplingParams
from llmkit.workload.driver import Played, run_workload
from llmkit.workload.named import WORKLOADS
from llmkit.workload.prompts import read_text
from llmkit.workload.protocol import ModelBounds, RunContext, RunOutcome, Target
from llmkit.workload.requests import TimedRequest, check_fits, check_one_sample
from llmkit.workload.settings import (
    BatchSettings,
    GammaSettings,
    NamedSettings,
    PoissonSettings,
    ServedSettings,
    SyntheticSettings,
    TraceSettings,
)
from llmkit.workload.synthesis import synthesise
from llmkit.workload.trace import read_rows, timed_requests

WARM_UP_TOKENS = 4
Build = Callable[[ModelBounds], list[TimedRequest]]


@dataclass(frozen=True, slots=True)
class ServedWorkload:
    """Timed requests for one model, and how to measure them. `is_checked`: refuse to run if a request cannot fit."""

    name: str
    settings: ServedSettings
    make: Build
    is_checked: bool = True

    def build(self, bounds: ModelBounds) -> list[TimedRequest]:
        """The requests, in order of arrival; ConfigError if they cannot be made or, when checked, cannot fit."""
        requests = self.make(bounds)
        if self.is_checked:
            check_fits(self.name, requests, bounds)
        return requests

    def check(self, sampling: SamplingParams, bounds: ModelBounds | None) -> None:
        """See `Workload`. How long prompts are does not depend on a tokenizer, so none is needed here."""
        check_one_sample(self.name, sampling)
        if bounds is not None and self.is_checked:
            self.build(replace(bounds, encode=lambda text: [0]))

    def run(self, target: Target, context: RunContext) -> RunOutcome:
        """See `Workload.run`. A fault of the engine is raised after what was measured so far is written."""
        check_one_sample(self.name, context.sampling)
        limits = target.engine.limits
        requests = self.build(ModelBounds(limits.vocab_size, limits.max_model_len, target.encode))
        sampling = context.sampling.model_copy(update={"ignore_eos": self.settings.ignore_eos})
        recorder, played = MetricsRecorder(), Played(interrupted=True)
        try:
            if self.settings.warm_up:
                warm_up(target, requests)
            with Progress(self.name, sum(request.max_tokens for request in requests), "tokens") as progress:
                played = run_workload(target, requests, sampling, recorder, progress, context.seed)
        except KeyboardInterrupt:
            pass  # while warming up; `played` is as good as interrupted
        finally:
            result = self._result(context, recorder, played, len(requests))
            files = write_run(context.run_dir, result, recorder, context.config_text)
        console = context.console or Console()
        print_summary(console, result["title"], result)
        for error in result["errors"]:
            console.print(error, style="red", highlight=False, markup=False)
        return RunOutcome(result, tuple(files), played.interrupted)

    def _result(
        self, context: RunContext, recorder: MetricsRecorder, played: Played, num_prompts: int
    ) -> dict[str, Any]:
        settings = self.settings
        goodput = GoodputLimits(settings.goodput_ttft_ms, settings.goodput_tpot_ms, settings.goodput_e2el_ms)
        rate = getattr(settings, "rate", math.inf)
        return {
            **summarise(recorder, goodput, context.device, played.interrupted),
            "num_prompts": num_prompts,
            "errors": errors(played),
            "title": title(self.name, context.labels),
            "backend": "llmkit",
            "model_id": context.labels.get("model"),
            "request_rate": rate if math.isfinite(rate) else "inf",
            "burstiness": getattr(settings, "burstiness", 1.0),
            **provenance(self.name, settings, context),
        }


def errors(played: Played) -> list[str]:
    """Up to three different reasons why requests were refused or failed."""
    refused = sorted({f"refused: {refusal}" for refusal in played.refusals.values()})
    failed = sorted({f"failed: {c.error}" for c in played.completions.values() if c.error is not None})
    return [*refused, *failed][:3]


def warm_up(target: Target, requests: Sequence[TimedRequest]) -> None:
    """Run about one full step of prompts as long as the first ones, and a few tokens more, so that what happens only
    once is over. The prompts are all zeros: they teach no prefix cache anything about the workload."""
    engine = target.engine
    settings = engine.planner.scheduler.settings
    longest = min(settings.max_num_batched_tokens, engine.limits.max_model_len - WARM_UP_TOKENS)
    lengths = [min(len(request.prompt_token_ids), longest) for request in requests[: settings.max_num_seqs]]
    ends = accumulate(lengths)
    prompts = [[0] * n for n, end in zip(lengths, ends, strict=True) if n > 0 and end - n < longest]
    if prompts:
        target.generate(prompts, SamplingParams(temperature=0.0, max_tokens=WARM_UP_TOKENS, ignore_eos=True))


def title(workload: str, labels: Mapping[str, str]) -> str:
    """Such as "poisson: model=embedded scheduler=continuous"."""
    return f"{workload}: " + " ".join(f"{key}={value}" for key, value in labels.items() if key != "workload")


def provenance(name: str, settings: Any, context: RunContext) -> dict[str, Any]:
    """What was run and where, for `result.json`."""
    return {
        "workload": {"name": name, **json.loads(settings.model_dump_json())},
        "labels": dict(context.labels),
        "sampling": context.sampling.model_dump(mode="json", exclude_defaults=True),
        "environment": {
            **environment(context.device),
            "dtype": context.dtype,
            "seed": context.seed,
            "overrides": list(context.overrides),
        },
    }


def batch(settings: BatchSettings) -> ServedWorkload:
    """All requests at once."""
    return _synthetic("batch", settings, math.inf)


def poisson(settings: PoissonSettings) -> ServedWorkload:
    """Poisson arrivals."""
    return _synthetic("poisson", settings, settings.rate)


def gamma(settings: GammaSettings) -> ServedWorkload:
    """Gamma inter-arrival times."""
    return _synthetic("gamma", settings, settings.rate, settings.burstiness)


def trace(settings: TraceSettings) -> ServedWorkload:
    """A recorded trace, read at once: what the engine refuses counts as failed."""
    rows = read_rows(settings)
    return ServedWorkload("trace", settings, lambda bounds: timed_requests(rows, settings, bounds), is_checked=False)


def _synthetic(name: str, settings: SyntheticSettings, rate: float, burstiness: float = 1.0) -> ServedWorkload:
    if settings.prompt_file:
        read_text(settings.prompt_file)  # a wrong name is told before a model loads
    return ServedWorkload(name, settings, lambda bounds: synthesise(settings, rate, burstiness, bounds))


def _preset(name: str) -> Callable[[PoissonSettings], ServedWorkload]:
    return lambda settings: _synthetic(name, settings, settings.rate)


def _named(name: str) -> Callable[[NamedSettings], ServedWorkload]:
    def factory(settings: NamedSettings) -> ServedWorkload:
        requests = cache(lambda: WORKLOADS[name](settings.seed))
        return ServedWorkload(name, settings, lambda bounds: requests())

    return factory


short_long, tenants, deadlines, shared_prefixes = map(
    _preset, ("short_long", "tenants", "deadlines", "shared_prefixes")
)
nano256, single, batch64, mixed512, prefill = map(_named, ("nano256", "single", "batch64", "mixed512", "prefill"))
