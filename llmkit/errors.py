"""Errors a user can act on. Their message is one line that says what is wrong and what would be right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LlmkitError(Exception):
    """Base of every error llmkit raises on purpose; the command prints its message without a traceback."""


class ConfigError(LlmkitError):
    """A wrong name, option or value, or a combination that cannot work."""


class PluginError(LlmkitError):
    """A plugin broke the rules of registration: duplicate name, misspelt hook, wrong type."""


class ModelError(LlmkitError):
    """A model that cannot be loaded or run: missing or corrupt checkpoint, unsupported architecture."""


class CapacityError(LlmkitError):
    """The asked cache or model does not fit in memory; the message says what would."""


class RequestError(LlmkitError):
    """One request is wrong (empty prompt, token id out of range, too long); its neighbours are not affected."""


def unknown_name(kind: str, name: str, valid: Iterable[str], notes: Iterable[str] = ()) -> str:
    """One line for an unknown `name`: the nearest valid one, all valid ones and related failures."""
    choices = sorted(valid)
    near = get_close_matches(name, choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    tail = "".join(f"; {note}" for note in notes)
    return f"unknown {kind} {name!r}{hint} (choices: {', '.join(choices) or 'none'}){tail}"
