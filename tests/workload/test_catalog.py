"""Listing workloads is light, every one of them loads, and wrong options are told in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llmkit.config import choose
from llmkit.errors import ConfigError
from llmkit.registry import Registry
from llmkit.workload import catalog


@pytest.fixture
def registry() -> Registry:
    built = Registry()
    catalog.llmkit_register(built)
    return built


def test_every_workload_loads_with_its_defaults(registry: Registry) -> None:
    names = registry.names("workload")
    assert {"grid", "batch", "poisson", "gamma", "trace", *catalog.PRESETS, *catalog.NAMED} == set(names)
    for name in names:
        component = registry.get("workload", name)
        if name == "trace":
            with pytest.raises(ConfigError, match=r"workload\.path: name a JSONL file"):
                component.load()(component.settings())
        else:
            assert hasattr(component.load()(component.settings()), "run")
        assert component.doc
        for option, field in component.settings.model_fields.items():
            assert field.description, f"{name}.{option} has no description"


def test_listing_them_imports_nothing_heavy() -> None:
    heavy = "torch", "numpy", "matplotlib", "rich", "transformers"
    code = f"import llmkit.workload.catalog, llmkit.workload.protocol, sys; print(*({heavy!r} & sys.modules.keys()))"
    code = code.replace(repr(heavy), repr(set(heavy)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_playing_a_served_workload_needs_no_torch() -> None:
    code = "import llmkit.workload.served, llmkit.workload.grid, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"name": "poisson", "rate": 0}, "workload.rate=0: .*greater than 0"),
        ({"name": "gamma", "burstiness": -1}, "workload.burstiness=-1"),
        ({"name": "batch", "prompt_len": [9, 3]}, r"workload.prompt_len=\[9, 3\]: the low end 9"),
        ({"name": "grid", "batch_size": []}, r"workload.batch_size=\[\]: give a list"),
        ({"name": "nano256", "num_requests": 3}, "workload.num_requests: no such option"),
        ({"name": "poison"}, "did you mean 'poisson'"),
    ],
)
def test_wrong_options_are_one_line(registry: Registry, options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        choose(registry, "workload", options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["batch", "poisson", "gamma", *catalog.PRESETS])
def test_a_file_that_cannot_be_read_is_told_before_a_model_is_there(registry: Registry, name: str) -> None:
    component = registry.get("workload", name)
    with pytest.raises(ConfigError, match=r"workload\.prompt_file='/no/such/file' cannot be read"):
        component.load()(component.settings(prompt_file="/no/such/file"))
    trace = registry.get("workload", "trace")
    with pytest.raises(ConfigError, match=r"workload\.path='/no/such/file' cannot be read"):
        trace.load()(trace.settings(path="/no/such/file"))
