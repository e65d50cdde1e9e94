"""Seconds from the start of a process to its first token, with Triton's cache empty (cold) and filled (warm).

python -m benchmarks.startup --model qwen3_0_6b --runs 3
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

FIRST_TOKEN = """
import sys, time
from llmkit import LLM, SamplingParams
imported = time.time()
llm = LLM(sys.argv[1], max_model_len=4096)
built = time.time()
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
print(imported, built, time.time())
"""


def first_token(model: str, cache: str) -> tuple[float, float, float]:
    """Seconds until llmkit was imported, until the engine stood, and until the first token."""
    started = time.time()
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    command = [sys.executable, "-c", FIRST_TOKEN, model]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    imported, built, spoke = (float(number) - started for number in done.stdout.splitlines()[-1].split())
    return imported, built, spoke


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3_0_6b")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    print("| Triton's cache | imported | engine built | first token |\n|---|---:|---:|---:|")
    times: dict[str, list[tuple[float, float, float]]] = {"cold": [], "warm": []}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as cache:
            for seen in times.values():
                seen.append(first_token(options.model, cache))
    for name, seen in times.items():
        medians = [statistics.median(part) for part in zip(*seen, strict=True)]
        print(f"| {name} | " + " | ".join(f"{seconds:.1f} s" for seconds in medians) + " |")


if __name__ == "__main__":
    main()
