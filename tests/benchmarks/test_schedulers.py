"""Every scheduler wins on its workload by the metric it stands for; the page and the pictures are of these runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import schedulers

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sjf_lowers_the_mean_latency(seed: int) -> None:
    before, after = schedulers.compare(schedulers.COMPARISONS["sjf"], seed=seed)
    for key in ("mean_e2el_ms", "mean_ttft_ms", "p50_e2el_ms"):
        assert after.numbers[key] < 0.9 * before.numbers[key], key
    assert after.numbers["output_throughput"] > 0.9 * before.numbers["output_throughput"]
    assert after.numbers["completed"] == before.numbers["completed"] == len(before.requests)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fair_shields_light_tenants_from_the_heavy_one(seed: int) -> None:
    before, after = schedulers.compare(schedulers.COMPARISONS["fair"], seed=seed)
    assert schedulers.lighter_tenants(after) < 0.2 * schedulers.lighter_tenants(before)
    heavy, *light = (schedulers.by_tenant(max)(after)[name] for name in sorted(schedulers.by_tenant(max)(after)))
    assert max(light) < 0.5 * heavy
    assert after.numbers["output_throughput"] > 0.95 * before.numbers["output_throughput"]
    assert after.numbers["completed"] == len(after.requests)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_deadline_meets_more_deadlines(seed: int) -> None:
    before, after = schedulers.compare(schedulers.COMPARISONS["deadline"], seed=seed)
    assert schedulers.deadlines_met(after) > 1.3 * schedulers.deadlines_met(before)
    late = [record for record in after.completed if not record.is_in_time]
    assert len(late) < 0.1 * len(after.requests), "admission lets in what ends too late"
    refused = [record for record in after.recorder.requests.values() if not record.is_completed]
    assert refused and all((record.error or "").startswith("it would end after its deadline: ") for record in refused)
    assert len(refused) + len(after.completed) == len(after.requests)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prefix_aware_finds_more_in_the_cache(seed: int) -> None:
    before, after = schedulers.compare(schedulers.COMPARISONS["prefix_aware"], seed=seed)
    assert schedulers.hit_rate(after) > 1.3 * schedulers.hit_rate(before)
    for key in ("mean_ttft_ms", "p50_ttft_ms", "p99_ttft_ms"):
        assert after.numbers[key] < 0.8 * before.numbers[key], key
    assert after.numbers["output_throughput"] > 1.1 * before.numbers["output_throughput"]
    assert after.numbers["completed"] == before.numbers["completed"] == len(before.requests)


def test_the_committed_page_and_pictures_are_what_the_script_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    page = shutil.copy(ROOT / "docs" / "schedulers.md", tmp_path / "docs")
    schedulers.main([], tmp_path)
    committed = (ROOT / "docs" / "schedulers.md").read_text()
    assert Path(page).read_text() == committed, "the figures have changed: python -m benchmarks.schedulers"
    assert capsys.readouterr().out in Path(page).read_text()
    for name in schedulers.COMPARISONS:
        assert (tmp_path / "docs" / "schedulers" / f"{name}.png").stat().st_size > 10_000
        assert (ROOT / "docs" / "schedulers" / f"{name}.png").is_file()
        assert f"schedulers/{name}.png" in Path(page).read_text()


def test_the_page_names_every_scheduler_and_experiment() -> None:
    text = (ROOT / "docs" / "schedulers.md").read_text()
    built_in = [c for c in schedulers.registry().components() if c.kind == "scheduler" and c.owner.startswith("llmkit")]
    for component in built_in:
        assert f"| `{component.name}` |" in text
    for name, comparison in schedulers.COMPARISONS.items():
        experiment = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
        assert f"/workload: {comparison.workload}\n" in experiment and f"scheduler: continuous,{name}\n" in experiment
    assert len(text.splitlines()) <= 80
