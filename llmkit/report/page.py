"""`report.html`: one self-contained page with the tables and the picture of a run."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from llmkit.metrics.recorder import MetricsRecorder
from llmkit.report.run_plot import run_picture
from llmkit.report.summary_table import STATISTICS, latency_rows, overview

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ border-bottom: 1px solid #ddd; padding: .25rem .8rem; text-align: left }}
td + td.n, th + th {{ text-align: right; font-variant-numeric: tabular-nums }}
img {{ max-width: 100% }}
</style></head><body>
<h1>{title}</h1>
{overview}
<h2>Latency, ms</h2>
{latencies}
<img alt="requests, KV blocks and tokens over time; distribution of latencies" src="data:image/png;base64,{picture}">
<h2>Where this comes from</h2>
{environment}
</body></html>
"""


def write_page(path: Path, result: Mapping[str, Any], recorder: MetricsRecorder) -> None:
    """Write the page. `result` holds the numbers, and optionally "title" and "environment"."""
    page = PAGE.format(
        title=escape(str(result.get("title", "llmkit run"))),
        overview=_table(overview(result)),
        latencies=_table(latency_rows(result), ("", *STATISTICS), "n"),
        picture=base64.b64encode(run_picture(recorder)).decode(),
        environment=_table(_flat(result.get("environment", {}))),
    )
    path.write_text(page, encoding="utf-8")


def _table(rows: Iterable[tuple[str, ...]], header: tuple[str, ...] = (), cell_class: str = "") -> str:
    """An HTML table; everything is escaped."""
    attribute = f' class="{cell_class}"' if cell_class else ""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"] if header else []
    for first, *rest in rows:
        cells = "".join(f"<td{attribute}>{escape(cell)}</td>" for cell in rest)
        lines.append(f"<tr><td>{escape(first)}</td>{cells}</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as dotted rows."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            words = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((prefix + key, "-" if value is None else words))
    return rows
