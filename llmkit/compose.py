"""Composing a run from the command line with Hydra: options into the ConfigStore, plain data out, errors in one line.

The only file that knows Hydra. Nothing here decides what an option means: that is
`llmkit.config`; here its defaults become groups, so that a foreign plugin appears in `--help` and sweeps by itself.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmkit.config import SECTIONS, RunConfig, conf_dir, defaults, elsewhere
from llmkit.errors import ConfigError, LlmkitError, no_such_option, unknown_name
from llmkit.interfaces.settings import Settings
from llmkit.registry import KINDS, RESERVED, Registry

MISSING = "???"
GROUPS = (*KINDS, *SECTIONS, "experiment")
REPHRASED = (
    (r"An item is already at '([^']+)'", "{} exists already: leave out the +"),
    (r"^Config group override must be", "a group takes a name: write GROUP=NAME; `llmkit plugins` lists all names"),
    (r"^(\S+) appears more than once in the final defaults list", "{} is chosen already: leave out the +"),
    (r"^Multiple values for (\S+?)\.? To override", "{} is chosen twice: leave one out"),
    (
        r"^Could not delete from config. '([^']*)'",
        "there is no {} to take away; leave the ~ out: what is not given keeps its default",
    ),
)
"""What Hydra says, and what to say instead."""


@dataclass(frozen=True, slots=True)
class Job:
    """One composed run: `raw` is plain data for `llmkit.config.resolve`, `run_dir` its own new folder."""

    raw: Mapping[str, Any]
    run_dir: Path
    overrides: tuple[str, ...]
    is_sweep: bool


def store(registry: Registry) -> None:
    """Give Hydra every component as `kind=name` and every section as `section=default`, with their default options."""
    config_store = ConfigStore.instance()
    for group in (*KINDS, *SECTIONS):
        config_store.repo.pop(group, None)
    for component in (one for one in registry.components() if one.kind in KINDS):
        node = {"name": component.name, **defaults(component.settings, MISSING)}
        config_store.store(name=component.name, node=node, group=component.kind, provider=component.owner)
    for kind, names in RESERVED.items():
        for name in names:
            config_store.store(name=name, node={"name": name}, group=kind, provider="llmkit")
    for section, model in SECTIONS.items():
        config_store.store(name="default", node=defaults(model, MISSING), group=section, provider="llmkit")


def run_hydra(argv: Sequence[str], registry: Registry, task: Callable[[Job], None]) -> None:
    """Compose from `argv` and call `task` once, or once per combination of a sweep.

    Raises ConfigError, one line, for whatever Hydra finds wrong. The first exception of `task` is raised at the end:
    a failing combination does not stop a sweep.
    """
    OmegaConf.register_new_resolver("pid", lambda: str(os.getpid()), replace=True)
    raised: list[Exception] = []
    num_jobs = 0

    def composed(cfg: DictConfig) -> None:
        nonlocal num_jobs
        num_jobs += 1
        try:
            task(_job(cfg, argv, registry))
        except Exception as error:
            raised.append(error)
            if isinstance(error, LlmkitError):
                drop_unused(Path(HydraConfig.get().runtime.output_dir))

    with _hydra_raises(_flags_first(argv)):
        try:
            hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(composed)()
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC) and not error.filename:
                raise  # standard output takes nothing
            raise ConfigError(explain(error, argv, registry)) from error
        finally:
            _drop_unused_sweeps()
    if raised:
        raise raised[0]
    if not num_jobs and (empty := [argument for argument in argv if re.search(r"=(glob|range)\(", argument)]):
        raise ConfigError(f"nothing to run: {empty[0]} names nothing")


def _flags_first(argv: Sequence[str]) -> list[str]:
    """`argv` with flags and their values in front: Hydra's parser takes no flag between two overrides."""
    return sorted(argv, key=lambda word: not word.startswith("-") and ("=" in word or word.startswith("~")))


def drop_unused(folder: Path) -> None:
    """Remove the folder of a run that was refused before anything was written or logged, Hydra's records aside.

    The folders around it go as well if they lie in the current one and hold nothing else.
    """
    if any(path.stat().st_size for path in folder.iterdir() if path.is_file()):
        return
    shutil.rmtree(folder / ".hydra", ignore_errors=True)
    (folder / "llmkit.log").unlink(missing_ok=True)
    _remove_while_empty(folder)


def _drop_unused_sweeps() -> None:
    """Remove folders of this process' sweeps (`conf/config.yaml` names them) that hold nothing but Hydra's record."""
    for record in Path.cwd().glob(f"multirun/*/*-{os.getpid()}/multirun.yaml"):
        if len(list(record.parent.iterdir())) == 1:
            record.unlink()
            _remove_while_empty(record.parent)


def _remove_while_empty(folder: Path) -> None:
    """Remove `folder`, and those around it that lie in the current one, up to the first that holds something."""
    here = Path.cwd()
    for one in (folder, *folder.parents):
        if any(one.iterdir()) or one == here or (one != folder and here not in one.parents):
            break
        one.rmdir()


@contextmanager
def _hydra_raises(argv: Sequence[str]) -> Iterator[None]:
    """Hand Hydra `argv`, and have it raise its errors instead of printing them."""
    old_argv, old_flag = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["llmkit run", *argv], "1"
    try:
        yield
    finally:
        sys.argv = old_argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if old_flag is not None:
            os.environ["HYDRA_FULL_ERROR"] = old_flag


def _job(cfg: DictConfig, argv: Sequence[str], registry: Registry) -> Job:
    settings = HydraConfig.get()
    try:
        raw = _without_missing(OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, argv, registry)) from error
    if lists := [kind for kind in KINDS if kind not in settings.runtime.choices and raw.get(kind)]:
        kind = lists[0]
        choices = ", ".join((*RESERVED.get(kind, ()), *registry.names(kind)))
        raise ConfigError(f"{kind} takes one name, not a list: -m {kind}=A,B runs both (choices: {choices})")
    if "experiment" in raw:
        raise ConfigError("a file of presets for a whole run begins with the line: # @package _global_")
    if texts := [key for key in (*KINDS, *SECTIONS) if not isinstance(raw.get(key, {}), dict)]:
        key = texts[0]
        raise ConfigError(f"{key}: {raw[key]!r} stands where its options belong; {_preset_choice(key, raw[key])}")
    for kind, chosen in settings.runtime.choices.items():
        names = (*registry.names(kind), *RESERVED.get(kind, ()))
        name = raw[kind].get("name", chosen) if chosen in names and raw.get(kind) else chosen  # a preset has its own
        if name != chosen:
            raise ConfigError(f"{kind}.name={name}: a part is chosen by its group: write {kind}={name}")
    is_sweep = settings.mode is RunMode.MULTIRUN
    return Job(raw, Path(settings.runtime.output_dir), tuple(settings.overrides.task), is_sweep)


def _without_missing(value: Any) -> Any:
    """Drop required options that got no value, so that validation names them."""
    if isinstance(value, dict):
        return {key: _without_missing(inner) for key, inner in value.items() if inner != MISSING}
    return value


def _preset_choice(group: str, name: object) -> str:
    """How a file of presets chooses a part."""
    return f"a preset chooses under `defaults:` with `- override /{group}: {name}`"


def to_yaml(plain: Mapping[str, Any]) -> str:
    """Plain data as YAML, in the given order."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(plain)))


def explain(error: Exception, argv: Sequence[str], registry: Registry) -> str:
    """Hydra's complaint in one line: what is wrong, what would be right, and which plugins failed."""
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override), str(error))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.partition("/")
        inner, _, choice = name.partition("/")
        if inner in GROUPS and choice:
            return _preset_choice(inner, choice)
        if group not in GROUPS:
            group, _, name = error.missing_cfg_file.rpartition("/")
        return unknown_name(group, name, error.options, registry.notes(group) if group in KINDS else ())
    if isinstance(error, OSError) and error.errno and not str(error.filename).endswith(".yaml"):
        gone = ", the current folder may be gone" if error.errno == errno.ENOENT else ""
        where = f" {error.filename}" if error.filename else gone
        option = "hydra.sweep.dir" if {"-m", "--multirun"} & {*argv} else "hydra.run.dir"
        return f"cannot make the run folder{where}: {error.strerror}; {option}=DIR puts it elsewhere"
    text = str(error)
    if match := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)'(?: requires|\n)", text):
        is_group = match[1].lstrip("+").partition("=")[0] in GROUPS
        as_list = "" if is_group else ", or write [a,b] for a list"
        return f"{match[1]} names several values: add -m to run them all{as_list}"
    if match := re.search(r"Could not override '\w+/(\w+)@", text):
        return _preset_choice(match[1], "NAME")
    if match := re.search(r"Could not override '([^']*)'", text):
        return _unknown_option(match[1], argv, registry)
    for pattern, says in REPHRASED:
        if match := re.search(pattern, text):
            return says.format(*match.groups())
    if isinstance(error, UnicodeDecodeError):
        return f"a config file is not in UTF-8: {text}"
    text += f": {error.__cause__}" if error.__cause__ else ""
    text = re.sub(r"\n\s+full_key: (\S+)\n\s+object_type=\w+", r" (\1)", text)
    return " ".join(text.split()) or type(error).__name__


def _unreadable(override: str, problem: str) -> str:
    """One line for what Hydra's grammar does not take, such as a ~ or an accent outside of quotes."""
    key, _, value = override.partition("=")
    advice = "write GROUP=NAME or GROUP.OPTION=VALUE"
    if "LexerNoViableAlt" in problem and value and re.fullmatch(r"[+~]*\w+([./]\w+)*", key):
        if value.startswith("~/"):
            return f"cannot read {override!r}: the shell leaves that ~ as it is: write {key}=$HOME{value[1:]}"
        if not re.search(r"[\"'\[{]", value):
            return f"cannot read {override!r}: such characters stand in quotes within quotes: '{key}=\"{value}\"'"
        advice = "texts with characters such as ~ and é stand in double quotes, the whole in single ones"
    problem = problem.splitlines()[0].removesuffix(f" '{override}'").partition(" expecting")[0]
    return f"cannot read {override!r}: {problem}; {advice}"


def _unknown_option(key: str, argv: Sequence[str], registry: Registry) -> str:
    """Say which options the part that `key` belongs to has, in the component chosen by `argv` or by default."""
    head, _, option = key.partition(".")
    if key == "experiment":
        return "no experiment is chosen unless you add one: write +experiment=NAME"
    if head not in (*KINDS, *SECTIONS) or not option:
        return unknown_name("option or group", key, [*RunConfig.model_fields, "experiment"])
    option = option.partition(".")[0]
    names = [name for name in _chosen(head, argv, registry) if name in registry.names(head)]
    models = [SECTIONS[head]] if head in SECTIONS else [registry.get(head, name).settings for name in names]
    lacking = [name for name, model in zip(names, models, strict=False) if option not in model.model_fields]
    if lacking and len(lacking) < len(names):
        having = [name for name in names if name not in lacking]
        return (
            f"{key}: {head}={','.join(having)} has this option, {head}={','.join(lacking)} has not: "
            "sweep over both kinds in two runs"
        )
    for model in models:
        if option not in model.model_fields:
            return no_such_option(model, option, head) + elsewhere(head, option, registry)
        if isinstance(defaults(model, MISSING)[option], dict):
            return f"{key}: entries are added with a plus: +{head}.{option}={{KEY:VALUE}}"
    if not models:  # such as attention=auto
        return no_such_option(Settings, option, head) + elsewhere(head, option, registry)
    return f"{key}: no such option"


def _chosen(kind: str, argv: Sequence[str], registry: Registry) -> list[str]:
    """Names that `argv` chooses for `kind`, sweeps included; else the default of `config.yaml`."""
    values = [argument.partition("=")[2] for argument in argv if argument.lstrip("+").startswith(f"{kind}=")]
    names = re.findall(r"\w+", " ".join(values[-1:]))  # of two on one line the last counts
    known = [name for name in registry.names(kind) if name in names or "glob" in names]
    if known:
        return known
    composition = OmegaConf.load(conf_dir() / "config.yaml")
    return [entry[kind] for entry in composition.defaults if kind in entry]
