"""The built-in workloads, registered like anyone else's. Protocol for whoever runs them:

    factory = registry.get("workload", "poisson").load()      # imports numpy, not torch
    workload = factory(PoissonSettings(rate=4.0))             # ConfigError if the options make no sense
    outcome = workload.run(target, RunContext(run_dir, ...))  # plays it; see `llmkit.workload.protocol`

`target` is an `llmkit.LLM` (`engine`, `plugin_manager`, `generate`, `naive_model`, `encode`). `run` writes the run
folder (`result.json`, `requests.jsonl`, `steps.jsonl`, `trace.json.gz`, `report.html`, `config.yaml`; the grid: its
tables and picture), prints one table on `context.console` and shows progress on stderr. It returns a `RunOutcome`;
`outcome.interrupted` says that Ctrl-C ended it early, with partial results written.
"""

from __future__ import annotations

from llmkit.hookspecs import hookimpl
from llmkit.registry import Registry
from llmkit.workload.settings import (
    BatchSettings,
    DeadlinesSettings,
    GammaSettings,
    GridSettings,
    NamedSettings,
    PoissonSettings,
    SharedPrefixesSettings,
    ShortLongSettings,
    TenantsSettings,
    TraceSettings,
)

NAMED = {
    "nano256": "nano-vllm's published bench: 256 requests of 100-1024 in, 100-1024 out",
    "single": "one request, 128 in, 256 out",
    "batch64": "64 requests, 512 in, 256 out",
    "mixed512": "512 requests, 100-1024 in, 100-1024 out",
    "prefill": "32 requests, 8192 in, 8 out",
}

PRESETS: dict[str, type[PoissonSettings]] = {
    "short_long": ShortLongSettings,
    "tenants": TenantsSettings,
    "deadlines": DeadlinesSettings,
    "shared_prefixes": SharedPrefixesSettings,
}
"""Poisson arrivals whose defaults show what a scheduler is good for."""


@hookimpl
def llmkit_register(registry: Registry) -> None:
    """Register the workloads by "module:attribute", so that listing them imports nothing heavy."""
    add, served = registry.add, "llmkit.workload.served"
    add("workload", "grid", "llmkit.workload.grid:GridWorkload", GridSettings, _doc(GridSettings))
    add("workload", "batch", f"{served}:batch", BatchSettings, _doc(BatchSettings))
    add("workload", "poisson", f"{served}:poisson", PoissonSettings, _doc(PoissonSettings))
    add("workload", "gamma", f"{served}:gamma", GammaSettings, _doc(GammaSettings))
    add("workload", "trace", f"{served}:trace", TraceSettings, _doc(TraceSettings))
    for name, settings in PRESETS.items():
        add("workload", name, f"{served}:{name}", settings, _doc(settings))
    for name, doc in NAMED.items():
        add("workload", name, f"{served}:{name}", NamedSettings, doc)


def _doc(settings: type) -> str:
    return (settings.__doc__ or "").partition("\n")[0]
