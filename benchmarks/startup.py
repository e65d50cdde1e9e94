"""Where the time from the start of a process to its first token goes.

Bare: neither Triton's kernels nor the bytecode of any Python library is cached. Cold: the bytecode is, as most
installers leave it. Warm: both are.

python -m benchmarks.startup --model qwen3_0_6b --runs 3 --out benchmarks/results/h200/startup.md

Phases are exclusive: what one contains of another counts there only. On a GPU each waits for the device, so the sum is
a little more than an undisturbed start, which is timed as well.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

PHASES = {
    "llmkit.llm:load_plugins": "plugins",
    "llmkit.model.loading:load_config": "config",
    "llmkit.model.loading:inspect_architecture": "probe of the architecture",
    "llmkit.model.loading:_random": "weights",
    "llmkit.model.loading:_checkpoint": "weights",
    "llmkit.model.loading:_tokenizer": "tokenizer",
    "llmkit.model.certify:rehearse": "kernels",
    "llmkit.engine.trial:rehearse": "kernels",
    "llmkit.engine.assembly:compile_attention": "kernels",
    "llmkit.engine.decode_graph:rehearse": "kernels",
    "llmkit.model.network:certified_decoder": "certification",
    "llmkit.engine.assembly:bytes_of_largest_steps": "trial steps",
    "llmkit.engine.assembly:_captured": "graphs",
    "llmkit.llm:build_engine": "rest of the engine",
}
"""Function -> phase."""
START = "import json, sys, time\nbegan = time.time()\n"
FIRST_TOKEN = """
from llmkit import LLM, SamplingParams
imported = time.time()
llm = LLM(sys.argv[1], max_model_len=int(sys.argv[2]))
built = time.time()
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
print(json.dumps([imported, built, time.time()]))
"""
BY_PHASE = """
from importlib import import_module
spent, stack = {"Python": began - float(sys.argv[3])}, []
def phase(name, work, *args, **options):
    start = time.time()
    stack.append(0.0)
    try:
        return work(*args, **options)
    finally:
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            sys.modules["torch"].cuda.synchronize()
        took = time.time() - start
        spent[name] = spent.get(name, 0.0) + took - stack.pop()
        if stack:
            stack[-1] += took
lean_imports = import_module("llmkit.model.lean").lean_imports
with lean_imports():
    phase("import of torch", import_module, "torch")
phase("import of transformers", import_module, "llmkit.model.loading")
phase("other imports", import_module, "llmkit.llm")
def wrapped(name, work):
    return lambda *args, **options: phase(name, work, *args, **options)
for path, name in json.loads(sys.argv[4]).items():
    module, _, function = path.partition(":")
    module = import_module(module)
    setattr(module, function, wrapped(name, getattr(module, function)))
import torch
if torch.cuda.is_available():
    phase("CUDA context", lambda: torch.zeros(1, device="cuda"))
from llmkit import LLM, SamplingParams
llm = phase("rest of LLM", LLM, sys.argv[1], max_model_len=int(sys.argv[2]))
params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
phase("first step", llm.generate, [[1, 2, 3]], params)
print(json.dumps(spent))
"""


def run(code: str, cache: str, *arguments: object, python: Sequence[str] = ()) -> tuple[str, str]:
    """What `code` prints in a process of its own: its last line, and what it says on standard error."""
    command = [sys.executable, *python, "-c", START + code, *map(str, arguments)]
    environment = os.environ | {"TRITON_CACHE_DIR": f"{cache}/kernels", "PYTHONPYCACHEPREFIX": f"{cache}/bytecode"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.splitlines()[-1], done.stderr


def first_token(model: str, max_model_len: int, cache: str) -> dict[str, float]:
    """Seconds from the start until llmkit was imported, until the engine stood, and until the first token."""
    started = time.time()
    times = json.loads(run(FIRST_TOKEN, cache, model, max_model_len)[0])
    names = ("llmkit imported", "engine built", "first token")
    return {name: moment - started for name, moment in zip(names, times, strict=True)}


def by_phase(model: str, max_model_len: int, cache: str) -> dict[str, float]:
    """Seconds of each phase."""
    spent: dict[str, float] = json.loads(run(BY_PHASE, cache, model, max_model_len, time.time(), json.dumps(PHASES))[0])
    return spent


def by_package(model: str, max_model_len: int, cache: str) -> dict[str, float]:
    """Seconds that modules of a package take themselves when they are imported on the way to the first token."""
    said = run(FIRST_TOKEN, cache, model, max_model_len, python=("-X", "importtime"))[1]
    packages: Counter[str] = Counter()
    for microseconds, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s*(\w+)", said, re.MULTILINE):
        packages[name] += int(microseconds)
    return {name: microseconds / 1e6 for name, microseconds in packages.most_common()}


def table(title: str, seen: Mapping[str, Sequence[Mapping[str, float]]], least: float = 0.0) -> list[str]:
    """Medians of several runs, a column for each kind of run; rows that stay below `least` seconds are added up."""
    names = dict.fromkeys(name for runs in seen.values() for one in runs for name in one)
    rows = {name: [statistics.median(one.get(name, 0.0) for one in runs) for runs in seen.values()] for name in names}
    small = [values for values in rows.values() if max(values) < least]
    rows = {name: values for name, values in rows.items() if max(values) >= least}
    if small:
        rows["others"] = [sum(column) for column in zip(*small, strict=True)]
    lines = [f"| {title} | {' | '.join(seen)} |", "|---|" + "---:|" * len(seen)]
    return lines + [f"| {name} | {' | '.join(f'{value:.2f} s' for value in values)} |" for name, values in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3_0_6b")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    total: dict[str, list[dict[str, float]]] = {"bare": [], "cold": [], "warm": []}
    phases: dict[str, list[dict[str, float]]] = {"bare": [], "cold": [], "warm": []}
    case = options.model, options.max_model_len
    for _ in range(options.runs):
        for seen, measure in ((total, first_token), (phases, by_phase)):
            with tempfile.TemporaryDirectory() as cache:
                for state, runs in seen.items():
                    if state == "cold":
                        shutil.rmtree(f"{cache}/kernels", ignore_errors=True)
                    runs.append(measure(*case, cache))
    with tempfile.TemporaryDirectory() as cache:
        first_token(*case, cache)
        packages = {"warm": [by_package(*case, cache)]}
    lines = [
        f"Start of `{options.model}`, medians of {options.runs}.",
        "",
        *table("from the start of the process", total),
    ]
    lines += ["", *table("phase", phases), "", *table("package imported", packages, least=0.02)]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
