"""What a workload is given and what it gives back. Imports neither torch, numpy, rich nor matplotlib.

A registered workload is a factory: `registry.get("workload", name).load()(settings)` returns a `Workload`, and
`workload.run(target, context)` plays it, writes the run folder, prints its table and returns a `RunOutcome`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from llmkit.engine.engine import Engine
from llmkit.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from rich.console import Console


class Target(Protocol):
    """What workloads are played on: `llmkit.LLM`, or anything shaped like it."""

    @property
    def engine(self) -> Engine:
        """Idle when a workload starts; its clock gives every time that is reported."""
        ...

    @property
    def plugin_manager(self) -> pluggy.PluginManager:
        """Where an observer of `engine`'s event hooks is registered while a workload runs."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, /) -> Sequence[RequestOutput]:
        """Submit all prompts (token ids) at once and return their outputs in order."""
        ...

    def naive_model(self) -> Any:
        """The same weights as a plain `transformers` causal LM, for the grid's baseline."""
        ...

    def encode(self, text: str, /) -> list[int]:
        """Token ids of `text`, for prompts given as text."""
        ...


@dataclass(frozen=True, slots=True)
class RunContext:
    """The circumstances of one run; everything has a default but the folder.

    `sampling`: base parameters; each request's `max_tokens` replaces theirs. `config_text`: the composed config as
    YAML, copied into the folder. `labels`: what was chosen, such as {"model": "embedded", "scheduler": "continuous"};
    shown in tables and captions. `plots_dir`: where pictures for people go, besides the run folder; None: nowhere.
    `console`: a `rich.console.Console` for the table (stdout); None: a new one; progress goes to stderr.
    """

    run_dir: Path
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    seed: int = 0
    config_text: str = ""
    overrides: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = ""
    plots_dir: Path | None = Path("plots")
    console: Console | None = None


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a run ended. `result` is what `result.json` holds; `files`: what a person would open first."""

    result: Mapping[str, Any]
    files: tuple[Path, ...] = ()
    interrupted: bool = False


class Workload(Protocol):
    """A workload with its options.

    It may also have `check(sampling: SamplingParams, bounds: ModelBounds | None)`, which raises ConfigError for what
    cannot run. It is called before torch is imported, without bounds, and again before weights load; the cache may turn
    out to hold less than these bounds, so `run` looks for itself.
    """

    def run(self, target: Target, context: RunContext) -> RunOutcome:
        """Play it. Ctrl-C ends it early with partial results and `interrupted=True`; ConfigError if it cannot fit."""
        ...


@dataclass(frozen=True, slots=True)
class ModelBounds:
    """What prompts must respect: ids in [0, `vocab_size`), prompt and output within `max_model_len` tokens."""

    vocab_size: int
    max_model_len: int
    encode: Callable[[str], list[int]] | None = None
