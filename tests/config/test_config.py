"""Validation of a run before anything heavy loads: what is refused, and what the one line says."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, Field

from llmkit import ConfigError, EngineSettings, SamplingParams, Settings, load_plugins
from llmkit.config import Choice, RunConfig, choose, defaults, plain, resolve, validate
from llmkit.errors import allowed, did_you_mean, no_such_option, unknown_name
from llmkit.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_plugins()[0]


def composed(**changes: Any) -> dict[str, Any]:
    """What Hydra hands over when nothing is said, with `changes`."""
    names = {
        "scheduler": "continuous",
        "cache": "paged",
        "attention": "auto",
        "model": "embedded",
        "workload": "grid",
    }
    return {**{kind: {"name": name} for kind, name in names.items()}, "plots_dir": "plots", **changes}


def refusal(registry: Registry, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(registry, composed(**changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_resolve_gives_every_part_its_validated_options(registry: Registry) -> None:
    raw = composed(
        scheduler={"name": "priority", "ageing_seconds": 3},
        engine={"block_size": 8, "depth": 1},
        sampling={"temperature": 0.5, "stop": "end"},
    )
    config = resolve(registry, raw)
    assert type(config.scheduler.settings).__name__ == "PrioritySettings"
    assert config.scheduler.settings.model_dump()["ageing_seconds"] == 3.0
    assert (config.engine.block_size, config.engine.depth, config.engine.seed) == (8, 1, 0)
    assert (config.sampling.temperature, config.sampling.stop) == (0.5, ("end",))
    assert config.labels == {
        "scheduler": "priority",
        "cache": "paged",
        "attention": "auto",
        "model": "embedded",
        "workload": "grid",
    }


def test_config_is_frozen_and_its_choices_hash(registry: Registry) -> None:
    config = resolve(registry, composed())
    with pytest.raises(ValueError, match="frozen"):
        config.plots_dir = "elsewhere"  # type: ignore[misc]
    assert hash(config.scheduler) == hash(resolve(registry, composed()).scheduler)
    assert (
        config.scheduler != resolve(registry, composed(scheduler={"name": "continuous", "max_num_seqs": 2})).scheduler
    )


def test_plain_is_a_fixed_point_of_resolve(registry: Registry) -> None:
    config = resolve(registry, composed(scheduler={"name": "static", "max_num_seqs": 3}, model={"name": "llama_8b"}))
    written = plain(config)
    assert written["scheduler"]["max_num_seqs"] == 3 and written["scheduler"]["name"] == "static"
    assert resolve(registry, written) == config
    assert plain(resolve(registry, written)) == written


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scheduler": {"name": "contnuous"}}, "unknown scheduler 'contnuous'; did you mean 'continuous'? (choices: "),
        ({"cache": {"name": "pagd"}}, "did you mean 'paged'? (choices: contiguous, paged, radix)"),
        ({"attention": {"name": "sdp"}}, "unknown attention 'sdp'; did you mean 'sdpa'?"),
        ({"model": {"name": "embeded"}}, "unknown model 'embeded'; did you mean 'embedded'?"),
        ({"workload": {"name": "gird"}}, "unknown workload 'gird'; did you mean 'grid'?"),
        ({"cache": {}}, "cache: give a name (choices: contiguous, paged, radix)"),
        ({"attention": {"name": "auto", "split": 3}}, "attention.split: no such option (options: none)"),
        ({"attention": {"name": "auto", "kv_dtype": "fp8"}}, "(options: none); attention=flash has it"),
        ({"cache": {"name": "contiguous", "prefix": True}}, "(options: none); cache=paged has it"),
        ({"model": {"name": "hf"}}, "model.path: a value is required"),
        (
            {"scheduler": {"name": "static", "max_num_seq": 3}},
            "no such option; did you mean 'max_num_seqs'? (options: ",
        ),
        ({"scheduler": {"name": "static", "max_num_seqs": 0}}, "scheduler.max_num_seqs=0: Input should be greater"),
        ({"scheduler": {"name": "static", "max_num_seqs": 0}}, "(allowed: integer, 1 to 4096 or null)"),
        ({"scheduler": {"name": "static", "max_num_seqs": "x"}}, "scheduler.max_num_seqs='x': "),
        ({"engine": {"block_size": 4096}}, "engine.block_size=4096: Input should be less than or equal to 1024"),
        ({"engine": {"dtype": "fp8"}}, "engine.dtype='fp8': Input should be 'auto', 'float32', 'bfloat16', "),
        ({"engine": {"depth": 2}}, "engine.depth=2: Input should be 'auto', 0 or 1"),
        ({"engine": {"blocksize": 2}}, "engine.blocksize: no such option; did you mean 'block_size'?"),
        ({"sampling": {"max_tokens": 0}}, "sampling.max_tokens=0: Input should be greater than or equal to 1"),
        ({"sampling": {"n": 65}}, "(allowed: integer, 1 to 64)"),
        ({"sampling": {"logprobs": 21}}, "sampling.logprobs=21: "),
        ({"sampling": {"min_tokens": 20}}, "sampling: min_tokens=20 is above max_tokens=16"),
        ({"plots_dir": ""}, "plots_dir='': "),
        ({"plot_dir": "x"}, "plot_dir: no such option; did you mean 'plots_dir'?"),
    ],
)
def test_wrong_names_and_values_get_one_line(registry: Registry, changes: dict[str, Any], says: str) -> None:
    assert says in refusal(registry, **changes)


def test_every_wrong_value_of_a_part_is_named_at_once(registry: Registry) -> None:
    message = refusal(registry, engine={"block_size": 0, "seed": -1, "sed": 1})
    assert all(part in message for part in ("engine.block_size=0", "engine.seed=-1", "engine.sed: no such option"))


def test_choose_takes_names_mappings_and_choices(registry: Registry) -> None:
    by_name = choose(registry, "cache", "paged")
    assert by_name == choose(registry, "cache", {"name": "paged"}) == choose(registry, "cache", by_name)
    assert choose(registry, "attention", "auto") == Choice("auto", Settings())
    options = {"name": "static", "max_num_seqs": 5}
    assert choose(registry, "scheduler", options).settings.model_dump()["max_num_seqs"] == 5
    assert options == {"name": "static", "max_num_seqs": 5}, "the caller's mapping was changed"


class Part(Settings):
    """Options of every shape."""

    path: str = Field(min_length=1)
    ratio: float = Field(0.5, gt=0.0, lt=1.0)
    limit: float = float("inf")
    sizes: tuple[int, ...] = (1, 2)
    table: dict[str, int] = Field(default_factory=lambda: {"a": 1})
    opaque: Any = None


def test_defaults_are_plain_data_with_required_options_marked() -> None:
    assert defaults(Part, "???") == {
        "path": "???",
        "ratio": 0.5,
        "limit": float("inf"),
        "sizes": [1, 2],
        "table": {"a": 1},
        "opaque": None,
    }


def test_defaults_of_every_component_validate(registry: Registry) -> None:
    for component in registry.components():
        values = defaults(component.settings, "???")
        required = {name: value for name, value in values.items() if value == "???"}
        assert component.settings(**values) == component.settings(**required)
        assert "name" not in values


@pytest.mark.parametrize(
    ("model", "option", "words"),
    [
        (EngineSettings, "block_size", "integer, 1 to 1024 or null"),
        (EngineSettings, "num_blocks", "integer, 1 to 16777216 or null"),
        (EngineSettings, "gpu_memory_utilization", "number, above 0.0, at most 1.0"),
        (EngineSettings, "device", "auto or cpu or cuda"),
        (EngineSettings, "fused", "boolean"),
        (SamplingParams, "top_k", "integer, at least 0"),
        (Part, "ratio", "number, above 0.0, below 1.0"),
        (Part, "sizes", "list of integer"),
        (Part, "opaque", ""),
    ],
)
def test_allowed_says_it_in_words(model: type[BaseModel], option: str, words: str) -> None:
    assert allowed(model, option) == words


def test_nobody_is_asked_whether_they_meant_what_they_wrote() -> None:
    assert did_you_mean("seed", ["seed", "fused"]) == ""
    assert did_you_mean("sed", ["seed", "fused"]) == "; did you mean 'seed'?"
    assert unknown_name("part", "paged", ["paged"]) == "unknown part 'paged' (choices: paged)"
    assert no_such_option(Part, "path") == "path: no such option (options: path, ratio, limit, sizes, table, opaque)"


def test_validate_without_a_key_and_no_such_option() -> None:
    with pytest.raises(ConfigError, match=r"^ratio=1\.0: .*above 0\.0, below 1\.0\)$"):
        validate(Part, {"path": "x", "ratio": 1.0})
    assert no_such_option(Part, "pth").startswith("pth: no such option; did you mean 'path'?")
    assert RunConfig.model_config["frozen"] and RunConfig.model_config["extra"] == "forbid"


@pytest.mark.parametrize("option", ["block_size", "cpu_cache_gib", "depth", "seed"])
def test_true_is_no_number(option: str) -> None:
    with pytest.raises(ConfigError, match=f"^{option}=True: Input should be a number, not true or false"):
        validate(EngineSettings, {option: True})
    assert validate(EngineSettings, {"fused": True, "compile": False}).fused
