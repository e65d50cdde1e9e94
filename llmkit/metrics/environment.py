"""Where a result comes from: commit, versions, machine. Reads what is loaded, imports nothing heavy."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("llmkit", "torch", "transformers", "numpy", "pydantic", "hydra-core")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Facts to keep beside numbers; None for what cannot be found out."""
    torch = sys.modules.get("torch")
    is_cuda = device.startswith("cuda") and torch is not None and torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(Path(__file__).parents[2]),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "num_threads": torch.get_num_threads() if torch is not None else None,
        "device": device,
        "device_name": torch.cuda.get_device_name() if is_cuda and torch is not None else _cpu_name(),
    }


def commit(root: Path) -> str | None:
    """Commit of the checkout at `root`, with "+changes" if files differ; None outside a checkout."""
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
