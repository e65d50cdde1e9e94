"""Plays composed jobs. Everything is validated, and every file read, before torch is imported.

Weights are loaded once per process for runs that share them.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from llmkit.compose import Job, drop_unused, run_hydra, store, to_yaml
from llmkit.config import Choice, EngineSettings, RunConfig, plain, resolve
from llmkit.errors import ConfigError, LlmkitError
from llmkit.plugins import load_plugins, naming_plugins
from llmkit.registry import Registry
from llmkit.report.sweep_table import print_sweep
from llmkit.workload.protocol import ModelBounds, RunContext, RunOutcome

if TYPE_CHECKING:
    from llmkit.llm import LLM
    from llmkit.model.loading import DescribedModel, LoadedModel

PIPE_WIDTH = 160
KEPT_BYTES = 1 << 30
"""Weights of earlier runs of a sweep are dropped before the next model loads once they take more than this."""


def accept(*_: object) -> None:
    """The check of a workload that has none."""


def bounds_of(model: DescribedModel, settings: EngineSettings) -> ModelBounds:
    """What prompts must respect as far as it is known before the cache exists."""
    return ModelBounds(model.architecture.vocab_size, settings.max_model_len or model.architecture.max_model_len)


class Runner:
    """Plays composed jobs one after the other, and keeps loaded weights for those to come while they are small."""

    def __init__(self, registry: Registry, folders: list[Path] | None = None) -> None:
        self.registry = registry
        self.folders = folders if folders is not None else []
        self.num_failed = 0
        self.finished: list[tuple[str, Mapping[str, Any]]] = []
        self._models: dict[str, LoadedModel] = {}

    def __call__(self, job: Job) -> None:
        """Validate and play one job. In a sweep a job that cannot run is reported and the others go on."""
        self.folders.append(job.run_dir)
        try:
            with naming_plugins(self.registry, job.run_dir):
                outcome = self.play(job)
            self._report(job, outcome)
        except LlmkitError as error:
            if not job.is_sweep:
                raise
            self.num_failed += 1
            drop_unused(job.run_dir)
            say(f"{job.run_dir.name}: {error}")

    def _report(self, job: Job, outcome: RunOutcome) -> None:
        """Say where everything is. LlmkitError if not one request completed, KeyboardInterrupt after Ctrl-C."""
        say(f"run folder: {_relative(job.run_dir)}")
        for path in outcome.files:
            if not path.is_relative_to(job.run_dir):
                say(f"written: {_relative(path)}")
        self.finished.append((job.run_dir.name, outcome.result))
        if outcome.interrupted:
            raise KeyboardInterrupt
        num_prompts, reasons = outcome.result.get("num_prompts"), outcome.result.get("errors", ())
        if num_prompts and not outcome.result.get("completed", num_prompts):
            raise LlmkitError("; ".join([f"none of the {num_prompts} requests completed", *reasons]))

    def play(self, job: Job) -> RunOutcome:
        """Build what the job asks for and run its workload in its own folder."""
        config = resolve(self.registry, job.raw)
        check_folder("plots_dir", Path(config.plots_dir))
        factory = self.registry.get("workload", config.workload.name).load()
        workload = factory(config.workload.settings)
        check = getattr(workload, "check", accept)
        check(config.sampling, None)
        llm = self._llm(config, lambda model: check(config.sampling, bounds_of(model, config.engine)))
        scheduler = Choice(config.scheduler.name, llm.engine.planner.scheduler.settings)
        context = RunContext(
            run_dir=job.run_dir,
            sampling=config.sampling,
            seed=config.engine.seed,
            config_text=to_yaml(plain(config.model_copy(update={"scheduler": scheduler}))),
            overrides=job.overrides,
            labels=config.labels,
            device=llm.model.device.type,
            dtype=str(llm.model.dtype).removeprefix("torch."),
            plots_dir=Path(config.plots_dir),
        )
        outcome: RunOutcome = workload.run(llm, context)
        return outcome

    def _llm(self, config: RunConfig, check: Callable[[DescribedModel], object]) -> LLM:
        from llmkit.llm import LLM

        key = repr((config.model, config.engine.dtype, config.engine.device))
        if key not in self._models and sum(map(num_bytes, self._models.values())) > KEPT_BYTES:
            self._models.clear()
        release_memory()
        model = self._models.get(key, config.model)
        llm = LLM(model, config.scheduler, config.cache, config.attention, engine=config.engine, check=check)
        self._models[key] = llm.model
        return llm


def check_folder(option: str, folder: Path) -> None:
    """ConfigError unless `folder` can be written to, or made; it is not made here."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(f"{option}={folder}: {there} is not a folder that can be written to")


def num_bytes(model: LoadedModel) -> int:
    """Memory that the weights take."""
    return sum(parameter.nbytes for parameter in model.module.parameters())


def release_memory() -> None:
    """Give the KV pool of the run before back to the device, so that the next one may have all of it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def say(message: str) -> None:
    """One line to whoever is watching; never mixed with results."""
    print(f"llmkit: {message}", file=sys.stderr)


def _relative(path: Path) -> str:
    """As short as possible for a person who wants to open it."""
    shown = os.path.relpath(path)
    return str(path) if shown.startswith("..") else shown


def run(words: Sequence[str], folders: list[Path]) -> int:
    """Compose from `words` and play; `folders` takes the folder of each job as it begins. Returns failed sweep runs."""
    registry, _ = load_plugins()
    store(registry)
    runner = Runner(registry, folders)
    run_hydra(words, registry, runner)
    if len(runner.finished) > 1:
        print_sweep(runner.finished, Console(width=None if sys.stdout.isatty() else PIPE_WIDTH))
    return runner.num_failed
