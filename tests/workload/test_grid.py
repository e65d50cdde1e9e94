"""The grid: both arms on a tiny real model, and its order, limits and interruptions with arms made of paper."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmkit import LLM
from llmkit.errors import ConfigError
from llmkit.interfaces.clock import MonotonicClock
from llmkit.model.spec import ModelSpec
from llmkit.types import RequestOutput, SamplingParams
from llmkit.workload import grid as room
from llmkit.workload.grid import GridWorkload
from llmkit.workload.protocol import RunContext, RunOutcome, Target
from llmkit.workload.settings import GridSettings
from tests.workload.harness import FakeTarget, fake_target

TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def run(target: Target, folder: Path, **options: Any) -> tuple[RunOutcome, str]:
    text = io.StringIO()
    context = RunContext(
        folder / "run", console=Console(file=text, width=110), plots_dir=folder / "plots", labels={"model": "tiny"}
    )
    return GridWorkload(GridSettings.model_validate(options)).run(target, context), text.getvalue()


def test_both_arms_on_a_real_model_give_the_same_tokens(tmp_path: Path) -> None:
    llm = LLM(ModelSpec("tiny", config=TINY), dtype="float64", device="cpu")
    outcome, text = run(llm, tmp_path, prompt_len=[3, 9], batch_size=[1, 3], max_tokens=[4], repeats=2)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result == json.loads(json.dumps(outcome.result))
    assert (result["equal_tokens"], result["equal_outputs"], result["num_outputs"]) == (1.0, 8, 8)
    assert result["num_rounds"] == 2
    assert result["baseline"]["naive_dtype"] == "float64"
    assert set(result["geometric_means"]) == {"1", "3"}
    assert [(r["batch_size"], r["prompt_len"]) for r in result["rows"]] == [(1, 3), (1, 9), (3, 3), (3, 9)]
    for row in result["rows"]:
        assert row["speedup"] == pytest.approx(row["optimized_tok_s"] / row["naive_tok_s"])
        assert len(row["optimized_s"]) == len(row["naive_s"]) == 2
        assert min(*row["optimized_s"], *row["naive_s"]) > 0
        assert row["naive_mean_e2el_ms"] <= max(row["naive_s"]) * 1e3
    assert "100.0 % of tokens equal, 8 of 8 identical" in text
    assert "geometric mean" in text


def test_table_and_picture_are_where_people_look(tmp_path: Path) -> None:
    outcome, _ = run_on_paper(tmp_path, [], draws=True, batch_size=[1, 2])
    names = {path.name for path in outcome.files}
    assert {"benchmark_grid.png", "result.json"} <= names
    assert outcome.files[0] == tmp_path / "plots" / "benchmark_grid.png"
    for folder in (tmp_path / "run", tmp_path / "plots"):
        assert (folder / "benchmark_grid.png").read_bytes().startswith(b"\x89PNG")
        with (folder / "benchmark_grid.csv").open() as file:
            header, *rows = csv.reader(file)
        assert header == ["prompt_len", "batch_size", "max_tokens", "optimized tok/s", "naive tok/s", "speedup"]
        assert [row[:3] for row in rows] == [["4", "1", "3"], ["4", "2", "3"]]
        assert float(rows[0][5]) == pytest.approx(outcome.result["rows"][0]["speedup"], abs=0.01)


class PaperBaseline:
    """Stands in for `NaiveBaseline`: notes calls, takes a millisecond a prompt."""

    def __init__(self, log: list[Any], clock: MonotonicClock, interrupt_after: int) -> None:
        self.log = log
        self.clock = clock
        self.left = interrupt_after

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[list[list[int]], list[float]]:
        self.log.append(("B", max_tokens, [tuple(prompt) for prompt in prompts]))
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        finished_at = []
        for _ in prompts:
            self.clock.sleep_until(self.clock.now() + 0.001)
            finished_at.append(self.clock.now())
        return [[0] * max_tokens for _ in prompts], finished_at

    def describe(self) -> dict[str, str]:
        return {"naive_dtype": "paper"}


class LoggedTarget(FakeTarget):
    """Notes what the optimised arm was given."""

    log: list[Any]

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, /) -> list[RequestOutput]:
        self.log.append(("A", params.max_tokens, [tuple(prompt) for prompt in prompts]))
        assert params.ignore_eos
        assert params.temperature == 0.0
        return super().generate(prompts, params)

    def naive_model(self) -> object:
        return None


def run_on_paper(
    folder: Path, log: list[Any], interrupt_after: int = 0, draws: bool = False, **options: Any
) -> tuple[RunOutcome, str]:
    plain = fake_target(clock=MonotonicClock())
    target = LoggedTarget(plain.engine, plain.plugin_manager)
    target.log = log
    with pytest.MonkeyPatch.context() as patch:
        if not draws:
            patch.setattr("llmkit.report.grid.grid_picture", lambda result: b"not drawn")
        patch.setattr(room, "NaiveBaseline", lambda model, clock: PaperBaseline(log, clock, interrupt_after))
        return run(target, folder, **({"prompt_len": [4], "max_tokens": [3], "batch_size": [1, 2]} | options))


def test_arms_alternate_on_the_same_fresh_prompts(tmp_path: Path) -> None:
    log: list[Any] = []
    outcome, _ = run_on_paper(tmp_path, log, prompt_len=[4, 8], repeats=3)
    measured = log[-2 * 3 * 4 :]
    assert [entry[0] for entry in measured] == ["A", "B"] * 12
    seen = set()
    for ours, theirs in zip(measured[::2], measured[1::2], strict=True):
        assert ours[1:] == theirs[1:]
        seen |= set(ours[2])
    assert len(seen) == 3 * 2 * (1 + 2)  # no prompt is used twice
    assert not seen & {prompt for entry in log[: -len(measured)] for prompt in entry[2]}
    assert outcome.result["num_rounds"] == 3


def test_the_same_settings_give_the_same_prompts(tmp_path: Path) -> None:
    logs: list[list[Any]] = [[], [], []]
    for log, seed in zip(logs, (0, 0, 1), strict=True):
        run_on_paper(tmp_path, log, seed=seed, repeats=1)
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_the_time_limit_ends_after_a_whole_round(tmp_path: Path) -> None:
    outcome, text = run_on_paper(tmp_path, [], time_limit=1e-4, repeats=5)
    assert outcome.result["num_rounds"] == 1
    assert {len(row["optimized_s"]) for row in outcome.result["rows"]} == {1}
    assert not outcome.interrupted
    assert "one round" in text


def test_outputs_that_differ_are_reported(tmp_path: Path) -> None:
    outcome, text = run_on_paper(tmp_path, [])
    assert outcome.result["equal_tokens"] < 0.1
    assert "0 of 3 identical" in text


def test_ctrl_c_keeps_the_cells_measured_so_far(tmp_path: Path) -> None:
    outcome, text = run_on_paper(tmp_path, [], interrupt_after=4, repeats=2)  # two of warm-up, one round
    assert outcome.interrupted
    assert (tmp_path / "run" / "benchmark_grid.csv").exists() and not (tmp_path / "plots").exists()
    assert "stays as it is: this run was interrupted" in " ".join(text.split())
    assert outcome.result["interrupted"]
    assert [len(row["naive_s"]) for row in outcome.result["rows"]] == [1, 1]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["interrupted"]
    assert "interrupted" in text


def test_ctrl_c_before_the_first_cell_still_writes_a_result(tmp_path: Path) -> None:
    outcome, _ = run_on_paper(tmp_path, [], interrupt_after=1)
    assert outcome.interrupted
    assert outcome.result["rows"] == []
    assert not (tmp_path / "plots" / "benchmark_grid.png").exists()


def test_a_smaller_grid_leaves_the_pictures_of_a_larger_one(tmp_path: Path) -> None:
    def table(folder: str) -> list[str]:
        return (tmp_path / folder / "benchmark_grid.csv").read_text().splitlines()

    run_on_paper(tmp_path, [], prompt_len=[4, 8])
    large = table("plots")
    assert len(large) == 1 + 2 * 2
    outcome, text = run_on_paper(tmp_path, [], prompt_len=[4])
    assert "plots stays as it is: its grid has 4 cells, this one 2" in " ".join(text.split())
    assert table("plots") == large and len(table("run")) == 1 + 2
    assert all(path.is_relative_to(tmp_path / "run") for path in outcome.files)
    run_on_paper(tmp_path, [], prompt_len=[5, 9])
    assert table("plots") == table("run") != large


def test_a_grid_that_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs sequences of 303 tokens .* hold 256"):
        run_on_paper(tmp_path, [], prompt_len=[300])
    assert not list(tmp_path.iterdir())


def test_a_grid_refuses_several_samples_of_a_prompt(tmp_path: Path) -> None:
    context = RunContext(tmp_path / "run", sampling=SamplingParams(n=2))
    with pytest.raises(ConfigError, match=r"sampling\.n=2: workload grid draws one sample"):
        GridWorkload(GridSettings()).run(fake_target(), context)
    assert not list(tmp_path.iterdir())
