"""Shell completion: subcommands, groups, their choices and dotted keys. Imports neither torch nor Hydra."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from llmkit.config import SECTIONS, RunConfig, conf_dir
from llmkit.errors import LlmkitError
from llmkit.plugins import load_plugins
from llmkit.registry import KINDS, RESERVED, Registry

COMMANDS = ("run", "plugins", "generate", "completion")
SHELLS = ("bash", "zsh", "fish")
FLAGS = {
    "": ("--help", "--debug", "--version"),
    "run": ("-m", "--multirun", "--help", "--cfg", "--debug"),
    "generate": (
        "--model",
        "--max-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--seed",
        "--stop",
        "--dtype",
        "--device",
    ),
}
SCRIPTS = {
    "bash": """_llmkit() {
    local line="${COMP_LINE:0:$COMP_POINT}" cur IFS=$'\\n'
    cur="${line##* }"
    COMPREPLY=($(llmkit __complete "$line" 2>/dev/null))
    # readline splits words at "=": offer only what follows it
    if [[ $cur == *=* && $COMP_WORDBREAKS == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#"${cur%=*}="}"); fi
}
complete -o nospace -F _llmkit llmkit
""",
    "zsh": """#compdef llmkit
_llmkit() {
    local -a candidates
    candidates=(${(f)"$(llmkit __complete "${(j: :)words[1,CURRENT]}" 2>/dev/null)"})
    compadd -Q -S '' -- $candidates
}
compdef _llmkit llmkit
""",
    "fish": """complete -c llmkit -f -a '(llmkit __complete (commandline -cp | string collect) 2>/dev/null)'
""",
}


def script(shell: str) -> str:
    """What to source: it calls `llmkit __complete LINE` at every Tab."""
    return SCRIPTS[shell]


def complete(line: str) -> int:
    """Print the candidates for the last word of `line`, one a line; broken plugins offer nothing."""
    try:
        print("\n".join(candidates(line)))
    except LlmkitError:
        return 1
    return 0


def candidates(line: str) -> list[str]:
    """Every way to end the last word of `line` ("llmkit run sched"), sorted; words end at blanks."""
    words = line.split(" ")
    current = words[-1]
    done = [word for word in words[1:-1] if word]
    command = next((word for word in done if not word.startswith("-")), "")
    is_flag = current.startswith("-")
    found = FLAGS.get(command, ("--help",)) if is_flag else _words(command, done, current)
    return sorted({word for word in found if word.startswith(current)})


def _words(command: str, done: list[str], current: str) -> list[str]:
    if command == "completion":
        return list(SHELLS)
    if command == "":
        return list(COMMANDS)
    registry, _ = load_plugins()
    if command == "plugins":
        names = [component.name for component in registry.components()]
        return [*names, *SECTIONS] if "show" in done else ["show"]
    if command == "generate":
        return registry.names("model") if done[-1] == "--model" else []
    return _overrides(registry, done, current)


def _overrides(registry: Registry, done: list[str], current: str) -> list[str]:
    """Hydra overrides: "scheduler=", "scheduler=continuous", "scheduler.max_num_seqs=", "engine.device=cpu"."""
    key, equals, value = current.partition("=")
    plus = key[: len(key) - len(key.lstrip("+"))]
    key = key.lstrip("+")
    if equals:
        listed = value[: value.rfind(",") + 1]  # a sweep: complete after the last comma
        values = _choices(registry, key) or _values(_models(registry, key.partition(".")[0], done), key)
        return [f"{plus}{key}={listed}{choice}" for choice in values]
    group = key.partition(".")[0]
    if "." in key:
        options = {option for model in _models(registry, group, done) for option in model.model_fields}
        return [f"{plus}{group}.{option}=" for option in options]
    groups = [*KINDS, *SECTIONS]
    others = [name for name in RunConfig.model_fields if name not in groups]
    return [*(f"{plus}{name}=" for name in (*groups, *others)), *(f"{name}." for name in groups), "+experiment="]


def _choices(registry: Registry, group: str) -> list[str]:
    """Names a group offers: registered components and presets of `conf/`."""
    presets = [path.stem for path in (conf_dir() / group).glob("*.yaml")] if group else []
    if group in KINDS:
        return [*registry.names(group), *RESERVED.get(group, ()), *presets]
    return ["default", *presets] if group in SECTIONS else presets


def _models(registry: Registry, group: str, done: list[str]) -> list[type[BaseModel]]:
    """Options of `group`: of the component chosen earlier on the line, else of all."""
    if group in SECTIONS:
        return [SECTIONS[group]]
    if group not in KINDS:
        return []
    chosen = [word.partition("=")[2] for word in done if word.startswith(f"{group}=")]
    names = [name for name in registry.names(group) if name in ",".join(chosen).split(",")]
    return [registry.get(group, name).settings for name in names or registry.names(group)]


def _values(models: list[type[BaseModel]], key: str) -> list[str]:
    """Values of an option that has a short list of them."""
    option = key.partition(".")[2]
    for model in models:
        if option in model.model_fields:
            return _listed(model.model_fields[option].annotation)
    return []


def _listed(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(member.value) for member in annotation]
    return []
