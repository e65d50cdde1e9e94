"""Makes `docs/results.png` and the README's table from a run of the grid.

python benchmarks/results.py                                # run the grid, then write both
python benchmarks/results.py outputs/.../result.json        # write both from a run that is there
python benchmarks/results.py --overrides model=llama_8b     # run it with other options
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmkit.errors import ConfigError, LlmkitError
from llmkit.report.grid_plot import grid_picture
from llmkit.report.markdown import grid_markdown, replace_between_markers

ROOT = Path(__file__).resolve().parents[1]


def run_grid(overrides: Sequence[str]) -> dict[str, Any]:
    """Run the grid in a fresh process, away from this folder's outputs; the result."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["workload=grid", f"hydra.run.dir={folder}/run", f"plots_dir={folder}/plots", *overrides]
        done = subprocess.run([sys.executable, "-m", "llmkit.run", *options], cwd=ROOT)
        if done.returncode:
            raise ConfigError(f"the grid ended with code {done.returncode}; nothing was written")
        return read_result(Path(folder) / "run" / "result.json")


def read_result(path: Path) -> dict[str, Any]:
    """A grid's `result.json`; ConfigError if it is something else, or of a run that was cut short."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(result, dict) or not result.get("rows") or "geometric_means" not in result:
        raise ConfigError(f"{path} is not the result of a grid")
    if result["interrupted"]:
        raise ConfigError(f"{path} is of an interrupted run: its table would not be whole")
    return result


def write(result: dict[str, Any], root: Path) -> list[Path]:
    """Write picture and table below `root`; the table first, because the README may lack its markers."""
    readme, picture = root / "README.md", root / "docs" / "results.png"
    text = replace_between_markers(readme.read_text(encoding="utf-8"), grid_markdown(result))
    readme.write_text(text, encoding="utf-8")
    picture.parent.mkdir(exist_ok=True)
    picture.write_bytes(grid_picture(result))
    return [readme, picture]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Returns 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", nargs="?", type=Path, help="result.json of a grid; without it the grid is run")
    parser.add_argument("--overrides", nargs="*", default=[], help="options of the run, as for `llmkit run`")
    options = parser.parse_args(arguments)
    try:
        result = read_result(options.result) if options.result else run_grid(options.overrides)
        for path in write(result, root):
            print(f"written: {path.relative_to(root)}")
    except LlmkitError as error:
        print(f"results: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
