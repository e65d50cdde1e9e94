"""Finding plugins: who registered what, what failed, what is refused and what is kept out."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import pytest

import llmkit
from llmkit import ConfigError, ContinuousBatching, PluginError, Registry, RequestEvent, hookimpl, load_plugins
from llmkit.registry import KINDS

SCHEDULER = """
from llmkit import ContinuousBatching, hookimpl

class Mine(ContinuousBatching):
    '''What mine does.'''

@hookimpl
def llmkit_register(registry):
    registry.add_scheduler("{name}", Mine)
"""

Install = Callable[..., Path]


def owners(registry: Registry) -> dict[str, str]:
    return {f"{c.kind}/{c.name}": c.owner for c in registry.components()}


def test_built_ins_come_through_entry_points_with_their_owner() -> None:
    registry, _ = load_plugins()
    version = importlib.metadata.version("llmkit")
    assert registry.failures == {}
    assert {"sequential", "static", "continuous", "priority"} <= set(registry.names("scheduler"))
    assert {"paged", "contiguous"} <= set(registry.names("cache"))
    assert all(registry.names(kind) for kind in KINDS)
    ours = [f"{c.kind}/{c.name}" for c in registry.components() if c.owner == f"llmkit {version}"]
    assert {"scheduler/continuous", "cache/paged", "attention/sdpa", "model/embedded", "workload/grid"} <= set(ours)


def test_every_built_in_has_a_one_line_doc_and_loads() -> None:
    registry, _ = load_plugins()
    for component in registry.components():
        assert component.doc and "\n" not in component.doc, component
        assert callable(component.load()), component


def test_foreign_distribution_is_found_with_its_version(install: Install) -> None:
    install("foreign_a", SCHEDULER.format(name="mine"), "llmkit-foreign-a", "2.5")
    registry, _ = load_plugins()
    assert owners(registry)["scheduler/mine"] == "llmkit-foreign-a 2.5"
    assert registry.get("scheduler", "mine").doc == "What mine does."
    assert issubclass(registry.get("scheduler", "mine").load(), ContinuousBatching)


def test_failed_import_is_kept_and_named_and_harms_nobody(install: Install) -> None:
    install("foreign_b", "import no_such_module_at_all", "llmkit-foreign-b")
    registry, _ = load_plugins()
    assert registry.failures == {
        "llmkit-foreign-b:foreign_b": "ModuleNotFoundError: No module named 'no_such_module_at_all'"
    }
    assert "continuous" in registry.names("scheduler")
    with pytest.raises(ConfigError) as caught:
        registry.get("scheduler", "contnuous")
    message = str(caught.value)
    assert "did you mean 'continuous'?" in message and "priority" in message
    assert "plugin llmkit-foreign-b:foreign_b failed: ModuleNotFoundError" in message
    assert "\n" not in message


@pytest.mark.parametrize("source", ["raise RuntimeError('two\\nlines')", "import sys; sys.exit('two\\nlines')"])
def test_whatever_an_import_raises_becomes_one_line(install: Install, source: str) -> None:
    install("foreign_c", source, "llmkit-foreign-c")
    (reason,) = load_plugins()[0].failures.values()
    assert reason.endswith("two lines")


def test_register_that_raises_leaves_nothing_behind(install: Install) -> None:
    source = SCHEDULER.format(name="half") + "    raise KeyError('later')\n"
    install("foreign_d", source, "llmkit-foreign-d")
    registry, manager = load_plugins()
    assert "half" not in registry.names("scheduler")
    assert registry.failures == {"llmkit-foreign-d:foreign_d": "KeyError: 'later'"}
    assert not manager.has_plugin("llmkit-foreign-d:foreign_d")


def test_duplicate_name_is_refused_naming_both_distributions(install: Install) -> None:
    install("foreign_e", SCHEDULER.format(name="continuous"), "llmkit-foreign-e", "3.1")
    with pytest.raises(PluginError) as caught:
        load_plugins()
    version = importlib.metadata.version("llmkit")
    assert str(caught.value) == (
        f"scheduler 'continuous' is registered twice: by llmkit {version} and by llmkit-foreign-e 3.1"
    )


def test_misspelt_hook_is_refused_naming_the_plugin(install: Install) -> None:
    source = "from llmkit import hookimpl\n@hookimpl\ndef llmkit_registr(registry): ...\n"
    install("foreign_f", source, "llmkit-foreign-f", "0.3")
    with pytest.raises(PluginError) as caught:
        load_plugins()
    message = str(caught.value)
    assert message.startswith("plugin llmkit-foreign-f:foreign_f of llmkit-foreign-f 0.3: unknown hook")
    assert "did you mean 'llmkit_register'?" in message and "llmkit_step_finished" in message
    assert "\n" not in message


def test_wrong_hook_arguments_are_refused_naming_the_plugin(install: Install) -> None:
    source = "from llmkit import hookimpl\n@hookimpl\ndef llmkit_register(registrar): ...\n"
    install("foreign_g", source, "llmkit-foreign-g")
    with pytest.raises(PluginError, match=r"llmkit_register has no argument 'registrar' \(arguments: registry\)$"):
        load_plugins()


def test_names_and_classes_are_no_plugins() -> None:
    class Observer:
        @hookimpl
        def llmkit_request_finished(self, event: RequestEvent) -> None: ...

    with pytest.raises(PluginError, match="plugin 'mine': give the module or object itself"):
        load_plugins(["mine"])
    with pytest.raises(PluginError, match=r"plugin Observer is a class: give an instance, Observer\(\)"):
        load_plugins([Observer])
    with pytest.raises(PluginError, match=r"^plugins are a list of plugin objects, not Observer$"):
        load_plugins(Observer())  # type: ignore[arg-type]
    load_plugins([Observer()])


def test_a_given_object_is_called_by_its_class() -> None:
    class Observer:
        @hookimpl
        def llmkit_step_finishd(self) -> None: ...

    with pytest.raises(PluginError, match=r"^the given plugin Observer: unknown hook 'llmkit_step_finishd'"):
        load_plugins([Observer()])


def test_module_without_hooks_is_refused(install: Install) -> None:
    install("foreign_h", "def llmkit_register(registry): ...\n", "llmkit-foreign-h")
    with pytest.raises(PluginError, match=r"llmkit-foreign-h 1\.0 implements no hook: mark functions with"):
        load_plugins()


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("registry.add_scheduler('Bad-Name', Mine)", "cannot name a scheduler"),
        ("registry.add('kernel', 'x', Mine)", "unknown kind of component 'kernel'"),
        ("registry.add_attention('auto', 'm:C')", "cannot name a attention"),
        ("registry.add('cache', 'x', 'm:C', dict)", "must subclass llmkit.Settings"),
        ("registry.add('cache', 'x', 'm:C', Named)", "may not have an option called 'name'"),
    ],
)
def test_bad_registration_is_refused_naming_the_distribution(install: Install, call: str, problem: str) -> None:
    source = "from llmkit import Settings, hookimpl\nclass Mine: ...\nclass Named(Settings):\n    name: str = ''\n"
    install("foreign_i", f"{source}@hookimpl\ndef llmkit_register(registry):\n    {call}\n", "llmkit-foreign-i")
    with pytest.raises(PluginError) as caught:
        load_plugins()
    assert "llmkit-foreign-i 1.0" in str(caught.value) and problem in str(caught.value)


def test_lazy_component_that_fails_to_import_names_its_owner(install: Install) -> None:
    source = "from llmkit import hookimpl\n@hookimpl\ndef llmkit_register(registry):\n"
    source += "    registry.add_attention('broken', 'no_such_module_at_all:Backend')\n"
    install("foreign_j", source, "llmkit-foreign-j")
    component = load_plugins()[0].get("attention", "broken")
    with pytest.raises(PluginError, match=r"attention 'broken' of llmkit-foreign-j 1\.0 failed to import"):
        component.load()


@pytest.mark.parametrize(
    "name", ["llmkit-foreign-k", "LLMKIT_foreign.K", "their_entry", "llmkit-foreign-k:their_entry"]
)
def test_block_keeps_a_plugin_out_and_says_so(install: Install, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install("foreign_k", "raise RuntimeError('must not be imported')", "llmkit-foreign-k", entry="their_entry")
    monkeypatch.setenv("LLMKIT_BLOCK", f" {name} ,")
    registry, _ = load_plugins()
    assert registry.failures == {} and "continuous" in registry.names("scheduler")
    with pytest.raises(ConfigError, match="plugin llmkit-foreign-k:their_entry is kept out by LLMKIT_BLOCK"):
        registry.get("scheduler", "mine")


def test_allow_list_loads_nothing_else(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("foreign_l", SCHEDULER.format(name="mine"), "llmkit-foreign-l")
    monkeypatch.setenv("LLMKIT_PLUGINS", "llmkit-foreign-l,caches")
    registry, _ = load_plugins()
    assert registry.names("scheduler") == ["mine"]
    assert "paged" in registry.names("cache") and not registry.names("model")
    assert registry.blocked["llmkit:schedulers"] == "LLMKIT_PLUGINS"
    monkeypatch.setenv("LLMKIT_BLOCK", "llmkit-foreign-l")
    assert load_plugins()[0].names("scheduler") == []


@pytest.mark.parametrize("variable", ["LLMKIT_PLUGINS", "LLMKIT_BLOCK"])
def test_unknown_name_in_a_variable_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "llmkit:cache")
    with pytest.raises(PluginError, match=rf"{variable}: unknown plugin 'llmkit:cache'; did you mean 'llmkit:caches'"):
        load_plugins()


def test_blocked_duplicate_lets_the_other_through(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("foreign_m", SCHEDULER.format(name="continuous"), "llmkit-foreign-m")
    monkeypatch.setenv("LLMKIT_BLOCK", "llmkit-foreign-m")
    assert "llmkit-foreign-m" not in owners(load_plugins()[0])["scheduler/continuous"]


def test_extra_plugin_objects_are_owned_and_checked() -> None:
    class Extra:
        @hookimpl
        def llmkit_register(self, registry: Registry) -> None:
            registry.add_scheduler("extra", ContinuousBatching)

    plugin = Extra()
    registry, manager = load_plugins([plugin])
    assert owners(registry)["scheduler/extra"] == "the given plugin Extra"
    assert manager.is_registered(plugin)
    assert "extra" not in load_plugins()[0].names("scheduler"), "plugins of one call leak into the next"
    with pytest.raises(PluginError, match="the given plugin object implements no hook"):
        load_plugins([object()])


def test_not_installed_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.plugins.entry_points", lambda group: [])
    with pytest.raises(PluginError, match=r"not installed, so it has no plugins: run `pip install -e .*`$"):
        load_plugins()


def test_order_does_not_depend_on_the_path(install: Install) -> None:
    install("foreign_z", SCHEDULER.format(name="zz"), "llmkit-zz")
    install("foreign_y", SCHEDULER.format(name="yy"), "a-llmkit-yy")
    _, manager = load_plugins()
    names = [name for name, _ in manager.list_name_plugin()]
    assert names[-2:] == ["a-llmkit-yy:foreign_y", "llmkit-zz:foreign_z"]
    assert all(name.startswith("llmkit:") for name in names[:-2])


def test_attention_auto_goes_to_the_first_bidder() -> None:
    class Bidder:
        @hookimpl
        def llmkit_select_attention(self, requirements: llmkit.AttentionRequirements) -> str | None:
            return "theirs" if requirements.device == "cuda" else None

    _, manager = load_plugins([Bidder()])
    select = manager.hook.llmkit_select_attention
    assert select(requirements=llmkit.AttentionRequirements("cpu", "float32", 16, ())) == "sdpa"
    assert select(requirements=llmkit.AttentionRequirements("cuda", "float32", 16, ())) == "theirs"
