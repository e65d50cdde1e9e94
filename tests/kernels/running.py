"""Runs a file of kernel cases in a process of its own: Triton decides at import whether it interprets or compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTERPRETED = {"TRITON_INTERPRET": "1"}


def run_cases(*files: str, select: str = "", environment: dict[str, str] | None = None, project: Path = ROOT) -> None:
    """Run the cases of `files` (below the project) that match `select`, pytest's -k; all of them must pass."""
    plugins = ["-p", "tests.kernels.interpreter"] if environment == INTERPRETED else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore", "-p", "no:cacheprovider", *plugins]
    path = os.pathsep.join([str(project), str(project / "plugins"), os.environ.get("PYTHONPATH", "")])
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "-k", select, *files],
        cwd=project,
        env=inherited | {"PYTHONPATH": path} | (environment or {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
