"""The shape of a run: engine settings, chosen components and their options, validated before anything heavy loads.

Torch-free and without Hydra: `llmkit.LLM` and `llmkit.runner` both end here. Errors are one line with the dotted key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError
from pydantic_core import to_jsonable_python

from llmkit.engine.settings import EngineSettings as EngineSettings
from llmkit.errors import ConfigError, explain
from llmkit.interfaces.settings import Settings
from llmkit.registry import KINDS, RESERVED, Registry
from llmkit.types import SamplingParams

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Choice:
    """One chosen component: its registered name and its validated options. Hashable if its options are."""

    name: str
    settings: SerializeAsAny[Settings]


class RunConfig(Settings):
    """Everything one run of `llmkit run` needs."""

    scheduler: Choice
    cache: Choice
    attention: Choice
    model: Choice
    workload: Choice
    engine: EngineSettings
    sampling: SamplingParams
    plots_dir: str = Field(min_length=1, description="where pictures go, besides the run folder")

    @property
    def labels(self) -> dict[str, str]:
        """Kind of component -> chosen name."""
        return {kind: getattr(self, kind).name for kind in KINDS}


SECTIONS: dict[str, type[BaseModel]] = {"engine": EngineSettings, "sampling": SamplingParams}
"""The parts of a `RunConfig` that are not components, each with its options."""


def conf_dir() -> Path:
    """The folder of `config.yaml` and the presets: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    inside, beside = package / "conf", package.parent / "conf"
    return inside if (inside / "config.yaml").is_file() else beside


def resolve(registry: Registry, raw: Mapping[str, Any]) -> RunConfig:
    """Validate a composed config: `raw` maps each part to `{"name": ..., option: value}` or to its options."""
    rest: dict[str, Any] = {key: value for key, value in raw.items() if key not in KINDS and key not in SECTIONS}
    chosen = {kind: choose(registry, kind, raw.get(kind, {})) for kind in KINDS}
    sections = {key: validate(model, raw.get(key, {}), key) for key, model in SECTIONS.items()}
    return validate(RunConfig, {**chosen, **sections, **rest})


def defaults(settings: type[BaseModel], missing: str) -> dict[str, Any]:
    """Options and their default values as plain data; `missing` stands for a required one."""
    fields = settings.model_fields.items()
    return {
        name: missing if field.is_required() else to_jsonable_python(field.get_default(call_default_factory=True))
        for name, field in fields
    }


def plain(config: RunConfig) -> dict[str, Any]:
    """The config as plain data in the shape of the command line: options beside the component's name."""
    dumped = config.model_dump(mode="json")
    return {
        key: {"name": value["name"], **value["settings"]} if key in KINDS else value for key, value in dumped.items()
    }


def choose(registry: Registry, kind: str, value: str | Mapping[str, Any] | Choice) -> Choice:
    """Resolve `"paged"` or `{"name": "paged", option: value}`; ConfigError names the key and what is allowed."""
    if isinstance(value, Choice):
        return value
    options: dict[str, Any] = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{kind}: give a name (choices: {', '.join(registry.names(kind))})")
    settings = Settings if name in RESERVED.get(kind, ()) else registry.get(kind, name).settings
    try:
        return Choice(name, validate(settings, options, kind))
    except ConfigError as error:
        lacking = [option for option in options if option not in settings.model_fields]
        raise ConfigError(str(error) + "".join(elsewhere(kind, option, registry) for option in lacking)) from None


def elsewhere(kind: str, option: str, registry: Registry) -> str:
    """Such as "; attention=flash has it": which other choices have an `option` that the chosen one lacks."""
    names = [one.name for one in registry.components() if one.kind == kind and option in one.settings.model_fields]
    return f"; {kind}={','.join(names)} {'has' if len(names) == 1 else 'have'} it" if names else ""


def validate(model: type[M], values: Any, key: str = "") -> M:
    """`model` from `values`, or ConfigError with one line: every wrong dotted key and its allowed range."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(model, error, key)) from None
