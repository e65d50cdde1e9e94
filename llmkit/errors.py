"""Errors a user can act on. Their message is one line that says what is wrong and what would be right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.errors import PydanticUserError


class LlmkitError(Exception):
    """Base of every error llmkit raises on purpose; the command prints its message without a traceback."""


class ConfigError(LlmkitError):
    """A wrong name, option or value, or a combination that cannot work."""


class PluginError(LlmkitError):
    """A plugin broke the rules of registration (duplicate name, misspelt hook, wrong type), or its code failed."""


class ModelError(LlmkitError):
    """A model that cannot be loaded or run: missing or corrupt checkpoint, unsupported architecture."""


class CapacityError(LlmkitError):
    """The asked cache or model does not fit in memory; the message says what would."""


class RequestError(LlmkitError):
    """One request is wrong (empty prompt, token id out of range, too long); its neighbours are not affected."""


def first_line(error: Exception) -> str:
    """What `error` says, in one line."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Such as "; did you mean 'seed'?", or nothing if no word comes near or `word` is one of them."""
    near = get_close_matches(word, list(choices), n=1)
    return f"; did you mean {near[0]!r}?" if near and near[0] != word else ""


def unknown_name(kind: str, name: str, valid: Iterable[str], notes: Iterable[str] = ()) -> str:
    """One line for an unknown `name`: the nearest valid one, all valid ones and related failures."""
    choices = sorted(valid)
    tail = "".join(f"; {note}" for note in notes)
    return f"unknown {kind} {name!r}{did_you_mean(name, choices)} (choices: {', '.join(choices) or 'none'}){tail}"


def explain(model: type[BaseModel], error: ValidationError, key: str = "") -> str:
    """One line for what pydantic found wrong with a `model`: every wrong dotted key, its value and allowed range."""
    return "; ".join(_explain(model, problem, key) for problem in error.errors())


def _explain(model: type[BaseModel], problem: Any, key: str) -> str:
    path = [str(part) for part in problem["loc"]]
    dotted = ".".join([key, *path] if key else path)
    if problem["type"] == "extra_forbidden" and len(path) == 1:
        return no_such_option(model, path[0], key)
    if problem["type"] == "missing":
        return f"{dotted}: a value is required"
    message = problem["msg"].removeprefix("Value error, ")
    if not path:
        return f"{dotted}: {message}" if dotted else str(message)
    limits = "" if problem["type"] == "literal_error" else allowed(model, path[0])
    return f"{dotted}={problem['input']!r}: {message}" + (f" (allowed: {limits})" if limits else "")


def no_such_option(model: type[BaseModel], option: str, key: str = "") -> str:
    """One line for an option that `model` does not have: the nearest one and all."""
    options = list(model.model_fields)
    hint = did_you_mean(option, options)
    return f"{key}{'.' if key else ''}{option}: no such option{hint} (options: {', '.join(options) or 'none'})"


def allowed(model: type[BaseModel], field: str) -> str:
    """What `field` takes in words, such as "integer, 1 to 4096"; empty if its type says nothing simple."""
    try:
        schema = model.model_json_schema().get("properties", {}).get(field, {})
    except PydanticUserError:  # a type of the component's own that has no JSON schema
        return ""
    parts = [_in_words(part) for part in schema.get("anyOf", [schema])]
    return " or ".join(part for part in parts if part)


def _in_words(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(str(value) for value in schema["enum"])
    kind = str(schema.get("type", ""))
    if kind == "array":
        return f"list of {_in_words(schema.get('items', {})) or 'values'}"
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f"{kind}, {low} to {high}"
    bounds = {"at least": low, "above": above, "at most": high, "below": below}
    return ", ".join([kind, *(f"{word} {value}" for word, value in bounds.items() if value is not None)])
