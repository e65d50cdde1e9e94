"""Chooses the attention backend of a model, before its weights load; one that cannot serve it is refused, by name."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pluggy

from llmkit.errors import ConfigError, PluginError
from llmkit.interfaces.attention import AttentionBackend, AttentionRequirements
from llmkit.model.loading import DescribedModel, LoadedModel
from llmkit.registry import Component, Registry


def requirements_of(model: DescribedModel, block_size: int) -> AttentionRequirements:
    """What `model` on its device asks of an attention backend."""
    dtype = str(model.dtype).removeprefix("torch.")
    return AttentionRequirements(model.device.type, dtype, block_size, tuple(model.architecture.layers.values()))


def reasons_against(backend: type[AttentionBackend], model: DescribedModel, block_size: int | None) -> list[str]:
    """Why a backend cannot serve this model; empty if it can."""
    return backend.check(requirements_of(model, block_size or backend.preferred_block_size))


def able_backends(registry: Registry, model: DescribedModel, block_size: int | None) -> str:
    """For an error: the names of the installed backends that could serve this model on its device."""
    names = []
    for name in registry.names("attention"):
        with suppress(PluginError):  # a backend whose module cannot be imported
            if not reasons_against(registry.get("attention", name).load(), model, block_size):
                names.append(name)
    return f"(these can, here: {', '.join(names) or 'none'})"


def choose_backend(
    name: str, registry: Registry, hooks: pluggy.HookRelay, model: DescribedModel, block_size: int | None
) -> Component:
    """The backend called `name`, for "auto" the one that bids; ConfigError with every reason why it cannot serve."""
    if name == "auto":
        requirements = requirements_of(model, block_size or AttentionBackend.preferred_block_size)
        name = hooks.llmkit_select_attention(requirements=requirements)
        if name is None:
            able = able_backends(registry, model, block_size)
            raise ConfigError(f"attention=auto: no installed backend bids for {requirements.device} {able}")
    component = registry.get("attention", name)
    if reasons := reasons_against(component.load(), model, block_size):
        able = able_backends(registry, model, block_size)
        raise ConfigError(f"attention {name!r} cannot run model {model.name!r}: {'; '.join(reasons)} {able}")
    return component


def build_backend(
    backend: type[AttentionBackend], settings: Any, model: LoadedModel, block_size: int | None
) -> AttentionBackend:
    """Instantiate a backend that has been checked."""
    requirements = requirements_of(model, block_size or backend.preferred_block_size)
    return backend(settings, requirements, model.dtype, model.device)
