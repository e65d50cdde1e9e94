"""Every causal LM that transformers knows: equal to `transformers.generate` or refused; writes `docs/models.md` itself.

python -m tests.nightly.architectures
python -m tests.nightly.architectures --names llama gemma2 bloom --page models.md
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers

from llmkit import ModelError
from llmkit.model.certify import certified_decoder
from tests.equality.arrangements import CHOICES, run
from tests.equality.covering import Case, pairwise
from tests.equality.runs import references
from tests.equality.zoo import every_name, tiny_model
from tests.nightly.features import features
from tests.nightly.models_page import Finding, write_models_page
from tests.nightly.page import Circumstances
from tests.nightly.run import ROOT, commit, without_page

CERTIFIED_LEN = 64
LEAST_SPREAD = 1e-3
"""Logits that differ less from one position to the next, for every prompt, would hide mistakes."""


def look_at(name: str) -> Finding:
    """Whether llmkit takes the architecture, and what is special about it."""
    try:
        model = tiny_model(name)
    except ModelError as refusal:
        return _refused(name, str(refusal))
    except Exception as fault:
        return Finding(name, failures=(f"{name}: neither built nor refused: {_line(fault)}",))
    decoder, _ = certified_decoder(model, CERTIFIED_LEN)
    return Finding(name, special=tuple(features(model)), is_fused=decoder is not None)


def _refused(name: str, message: str) -> Finding:
    """Told apart from configs that transformers itself does not build."""
    prefix = f"cannot run {name} models"
    reason = message.removeprefix(prefix).removeprefix(": ")
    return Finding(name, refusal=reason) if message.startswith(prefix) else Finding(name, untried=message.rstrip(":"))


def arrange(findings: Iterable[Finding]) -> list[tuple[Finding, list[Case]]]:
    """The arrangements of a pairwise covering array over all architectures that llmkit takes."""
    by_name = {finding.name: finding for finding in findings if finding.special and not finding.failures}
    cases: defaultdict[str, list[Case]] = defaultdict(list)
    for case in pairwise({"model": list(by_name), **CHOICES}) if by_name else ():
        cases[str(case["model"])].append(case)
    return [(by_name[name], cases[name]) for name in by_name]


def try_out(job: tuple[Finding, list[Case]]) -> Finding:
    """Run an architecture in each of its arrangements."""
    finding, cases = job
    failures, error = [], 0.0
    try:
        spread = max(float(reference.logits.std(0).max()) for reference in references(finding.name))
    except Exception as fault:
        return replace(finding, failures=(f"{finding.name}: transformers itself: {_line(fault)}",))
    if spread < LEAST_SPREAD:
        failures.append(f"{finding.name}: its logits hardly change from one position to the next")
    for case in cases:
        arguments: dict[str, Any] = case
        try:
            error = max(error, run(**arguments).error)
        except Exception as fault:
            failures.append(f"{' '.join(map(str, case.values()))}: {_line(fault)}")
    return replace(finding, num_runs=len(cases), error=error, failures=tuple(failures))


def _line(fault: Exception) -> str:
    """What went wrong; of a bare assertion, the assertion."""
    return str(fault).strip().partition("\n")[0] or str(traceback.extract_tb(fault.__traceback__)[-1].line)


def _be_quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()  # type: ignore[attr-defined]
    torch.set_num_threads(1)


def go_through(names: Sequence[str], workers: int) -> list[Finding]:
    """All of them, `workers` at a time; one line to stderr for each."""
    with ProcessPoolExecutor(workers, get_context("spawn"), _be_quiet) as pool:
        findings = {finding.name: finding for finding in pool.map(look_at, names)}
        for finding in pool.map(try_out, arrange(findings.values())):
            findings[finding.name] = finding
            print(f"{finding.name}: {finding.num_runs} runs, {len(finding.failures)} failures", file=sys.stderr)
    return list(findings.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 if anything differs; the page is written in any case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", help="architectures to go through; all without it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "models.md", help="where to write")
    options = parser.parse_args(arguments)
    started, before = time.perf_counter(), commit()
    findings = go_through(options.names or every_name(), options.workers)
    given = without_page(sys.argv[1:] if arguments is None else arguments)
    command = " ".join(["python -m tests.nightly.architectures", *given])
    where = Circumstances(before, platform.python_version(), command, time.perf_counter() - started)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    options.page.write_text(write_models_page(findings, versions, where), encoding="utf-8")
    print(f"written: {options.page.name}")
    return int(any(finding.failures for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
