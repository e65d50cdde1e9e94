"""Composition on the command line: what reaches a run, what a sweep is, and Hydra's errors in one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from llmkit import ConfigError, ContinuousBatching, Registry, Settings, hookimpl, load_plugins
from llmkit.compose import Job, run_hydra, store, to_yaml
from llmkit.config import resolve


class Options(Settings):
    """Options of a plugin that has no YAML anywhere."""

    depth: int = 3
    needed: str


class Mine(ContinuousBatching):
    """Found without YAML."""


class Plugin:
    @hookimpl
    def llmkit_register(self, registry: Registry) -> None:
        registry.add_scheduler("mine", Mine)
        registry.add("workload", "theirs", lambda settings: None, Options, "a workload")


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_plugins([Plugin()])[0]


def jobs(registry: Registry, *argv: str) -> list[Job]:
    """Every job that `argv` composes."""
    found: list[Job] = []
    store(registry)
    run_hydra(argv, registry, found.append)
    return found


def refusal(registry: Registry, *argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        jobs(registry, *argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_said_composes_the_default(registry: Registry, workdir: Path) -> None:
    (job,) = jobs(registry)
    config = resolve(registry, job.raw)
    assert list(config.labels.values()) == ["continuous", "paged", "auto", "embedded", "grid"]
    assert config.sampling.temperature == 0.0
    assert not job.is_sweep and job.overrides == ()
    assert job.run_dir.is_dir() and job.run_dir.is_relative_to(workdir / "outputs")
    assert job.run_dir.name.endswith("-continuous-paged-embedded-grid")


def test_overrides_and_presets(registry: Registry, workdir: Path) -> None:
    argv = ("scheduler=priority", "scheduler.max_num_seqs=7", "engine=exact", "sampling=default", "model=llama_8b")
    (job,) = jobs(registry, *argv)
    config = resolve(registry, job.raw)
    assert config.scheduler.settings.model_dump()["max_num_seqs"] == 7
    assert (config.engine.dtype, config.engine.fused, config.engine.block_size) == ("float64", False, None)
    assert config.sampling.temperature == 1.0
    assert job.overrides == argv


def test_foreign_component_needs_no_yaml(registry: Registry, workdir: Path) -> None:
    (job,) = jobs(registry, "scheduler=mine", "scheduler.max_num_seqs=2", "workload=theirs", "workload.needed=x")
    assert job.raw["scheduler"]["name"] == "mine" and job.raw["scheduler"]["max_num_seqs"] == 2
    assert job.raw["workload"] == {"name": "theirs", "depth": 3, "needed": "x"}


def test_required_option_is_named_by_validation(registry: Registry, workdir: Path) -> None:
    (job,) = jobs(registry, "workload=theirs")
    with pytest.raises(ConfigError, match=r"^workload\.needed: a value is required$"):
        resolve(registry, job.raw)


def test_sweep_is_the_product_in_distinct_folders(registry: Registry, workdir: Path) -> None:
    found = jobs(registry, "-m", "scheduler=glob([c*,m*])", "cache=paged,contiguous")
    chosen = [(job.raw["scheduler"]["name"], job.raw["cache"]["name"]) for job in found]
    assert chosen == [(s, c) for s in ("continuous", "mine") for c in ("paged", "contiguous")]
    assert all(job.is_sweep for job in found)
    assert len({job.run_dir for job in found}) == len(found)
    assert [job.run_dir.name for job in found[:2]] == [
        "0-continuous-paged-embedded-grid",
        "1-continuous-contiguous-embedded-grid",
    ]


def test_failing_job_does_not_stop_a_sweep(registry: Registry, workdir: Path) -> None:
    seen: list[str] = []

    def task(job: Job) -> None:
        seen.append(job.raw["scheduler"]["name"])
        if len(seen) == 1:
            raise RuntimeError("the first one")

    store(registry)
    with pytest.raises(RuntimeError, match="the first one"):
        run_hydra(["-m", "scheduler=static,continuous"], registry, task)
    assert seen == ["static", "continuous"]


def test_ctrl_c_stops_a_sweep_at_once(registry: Registry, workdir: Path) -> None:
    seen: list[str] = []

    def task(job: Job) -> None:
        seen.append(job.raw["scheduler"]["name"])
        raise KeyboardInterrupt

    store(registry)
    with pytest.raises(KeyboardInterrupt):
        run_hydra(["-m", "scheduler=static,continuous"], registry, task)
    assert seen == ["static"]


def test_two_runs_never_share_a_folder(registry: Registry, workdir: Path) -> None:
    assert len({jobs(registry)[0].run_dir for _ in range(3)}) == 3
    assert str(os.getpid()) in jobs(registry)[0].run_dir.name


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["scheduler=contnuous"],
            "unknown scheduler 'contnuous'; did you mean 'continuous'? (choices: continuous, deadline, fair, mine, ",
        ),
        (["cache=x"], "unknown cache 'x' (choices: contiguous, paged, radix)"),
        (
            ["attention=sdp"],
            "unknown attention 'sdp'; did you mean 'sdpa'? (choices: auto, flash, flash_attn, flashinfer, sdpa, "
            "varlen)",
        ),
        (["model=lama_8b"], "unknown model 'lama_8b'; did you mean 'llama_8b'?"),
        (["engine=exakt"], "unknown engine 'exakt'; did you mean 'exact'? (choices: default, exact)"),
        (["+experiment=nope"], "unknown experiment 'nope'"),
        (["hydra/launcher=nope"], "unknown hydra/launcher 'nope' (choices: basic)"),
        (["-m", "cache=paged,x"], "unknown cache 'x' (choices: contiguous, paged, radix)"),
        (["schedulr=continuous"], "unknown option or group 'schedulr'; did you mean 'scheduler'?"),
        (["foo=1"], "unknown option or group 'foo' (choices: attention, cache, engine, experiment, model, "),
        (["experiment=schedulers"], "no experiment is chosen unless you add one: write +experiment=NAME"),
        (["scheduler=conf/static"], "unknown scheduler 'conf/static'; did you mean 'static'? (choices: continuous, "),
        (["foo.bar=1"], "unknown option or group 'foo.bar'"),
        (["scheduler.max_num_seq=3"], "scheduler.max_num_seq: no such option; did you mean 'max_num_seqs'? (options: "),
        (["scheduler=mine", "scheduler.ageing_seconds=3"], "scheduler.ageing_seconds: no such option (options: max_"),
        (
            ["-m", "scheduler=priority,mine", "scheduler.ageing_seconds=3"],
            "scheduler=priority has this option, scheduler=mine has not",
        ),
        (["cache=contiguous", "cache.prefix=off"], "cache.prefix: no such option (options: none); cache=paged has it"),
        (["attention.kv_dtype=fp8"], "attention.kv_dtype: no such option (options: none); attention=flash has it"),
        (["engine.sed=1"], "engine.sed: no such option; did you mean 'seed'?"),
        (["scheduler.max_num_seqs.x=1"], "scheduler.max_num_seqs.x: no such option"),
        (["+scheduler.max_chunk_tokens=3"], "scheduler.max_chunk_tokens exists already: leave out the +"),
        (["+cache=paged"], "cache is chosen already: leave out the +"),
        (["scheduler.name=static"], "scheduler.name=static: a part is chosen by its group: write scheduler=static"),
        (["attention={name: sdpa}"], "attention.name=sdpa: a part is chosen by its group: write attention=sdpa"),
        (["scheduler=static,mine"], "scheduler=static,mine names several values: add -m to run them all"),
        (["scheduler=glob(*)"], "scheduler=glob(*) names several values: add -m to run them all"),
        (["-m", "scheduler=glob(zz*)"], "nothing to run: scheduler=glob(zz*) names nothing"),
        (["-m", "engine.block_size=range(1,1)"], "nothing to run: engine.block_size=range(1,1) names nothing"),
        (["+experiment=sjf", "+experiment=fair"], "experiment is chosen twice: leave one out"),
        (["~scheduler.max_num_seqs"], "there is no scheduler.max_num_seqs to take away; leave the ~ out: what is"),
        (["-m", "hydra.sweep.dir=/dev/null/x"], "Not a directory; hydra.sweep.dir=DIR puts it elsewhere"),
        (
            ["cache=paged", "cache=contiguous", "cache.prefix=on"],
            "cache.prefix: no such option (options: none); ",
        ),
        (["scheduler"], "cannot read 'scheduler': Error parsing override; write GROUP=NAME or GROUP.OPTION=VALUE"),
        (["sampling.logit_bias={5:1}"], "entries are added with a plus: +sampling.logit_bias={KEY:VALUE}"),
        (["sampling.logit_bias.5=1"], "entries are added with a plus: +sampling.logit_bias={KEY:VALUE}"),
        (["sampling.seed.x=1"], "sampling.seed.x: no such option"),
        (["model=gpt2"], "; a checkpoint is its folder or hub id, for `llmkit run` model=hf model.path=DIR"),
        (["scheduler.max_num_seqs=[1,"], "cannot read 'scheduler.max_num_seqs=[1,': "),
        (["plots_dir=${nope}"], "Interpolation key 'nope' not found (plots_dir)"),
        (["--cfg", "job", "--info"], "Only one of --run"),
        (
            ["scheduler=[static]"],
            "scheduler takes one name, not a list: -m scheduler=A,B runs both (choices: continuous",
        ),
        (["attention=[auto,sdpa]"], "-m attention=A,B runs both (choices: auto, flash"),
        (["scheduler=null"], "a group takes a name: write GROUP=NAME; `llmkit plugins` lists all names"),
        (["engine=5"], "a group takes a name: write GROUP=NAME"),
        (["=static"], "unknown option or group '' (choices: "),
        (
            ["model.path=~/x"],
            "cannot read 'model.path=~/x': the shell leaves that ~ as it is: write model.path=$HOME/x",
        ),
        (["plots_dir=é"], "such characters stand in quotes within quotes: 'plots_dir=\"é\"'"),
        (
            ["sampling.stop=[é]"],
            "texts with characters such as ~ and é stand in double quotes, the whole in single ones",
        ),
        (["scheduler.=é"], "; write GROUP=NAME or GROUP.OPTION=VALUE"),
        (["scheduler=static,"], "mismatched input '<EOF>'; write GROUP=NAME or GROUP.OPTION=VALUE"),
        (["--config-name", "x"], "Cannot find primary config 'x'"),
        (["model=llama_1b/"], "llama_1b"),
        (["hydra.run.dir=/dev/null/x"], "cannot make the run folder /dev/null/x: Not a directory; hydra.run.dir=DIR"),
    ],
)
def test_hydra_errors_become_one_line(registry: Registry, workdir: Path, argv: list[str], says: str) -> None:
    assert says in refusal(registry, *argv)


def test_only_options_take_lists(registry: Registry, workdir: Path) -> None:
    assert refusal(registry, "scheduler=static,mine").endswith("add -m to run them all")
    assert refusal(registry, "sampling.stop=a,b").endswith("add -m to run them all, or write [a,b] for a list")


def test_flags_may_stand_anywhere(registry: Registry, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (job,) = jobs(registry, "cache=radix", "-m", "scheduler=mine")
    assert job.is_sweep and (job.raw["cache"]["name"], job.raw["scheduler"]["name"]) == ("radix", "mine")
    assert jobs(registry, "cache=radix", "--cfg", "job", "scheduler=mine") == []
    shown = capsys.readouterr().out
    assert "name: radix" in shown and "name: mine" in shown


def test_a_refused_run_leaves_nothing(registry: Registry, workdir: Path) -> None:
    (workdir / "outputs").mkdir()
    (workdir / "outputs/mine").touch()
    for argv in (["scheduler=[static]"], ["scheduler.name=static"], ["scheduler=[static]", "hydra.run.dir=x/y/z"]):
        refusal(registry, *argv)
        assert sorted(workdir.rglob("*")) == [workdir / "outputs", workdir / "outputs/mine"]
    refusal(registry, "scheduler=[static]", "hydra.run.dir=outputs")
    assert (workdir / "outputs/mine").is_file(), "what lay there before stays, though it is empty"


@pytest.mark.parametrize(
    "words", [["scheduler=nope,mine"], ["scheduler=glob(zz*)"], ["scheduler=mine", "scheduler.name=static,fair"]]
)
def test_a_sweep_that_is_refused_as_a_whole_leaves_nothing(registry: Registry, workdir: Path, words: list[str]) -> None:
    refusal(registry, "-m", *words)
    assert list(workdir.rglob("*")) == []


def test_failed_plugins_are_named_where_a_component_is_missing(registry: Registry, workdir: Path) -> None:
    registry.failures["llmkit-broken:x"] = "ImportError: no foo"
    try:
        assert refusal(registry, "scheduler=x").endswith("; plugin llmkit-broken:x failed: ImportError: no foo")
        assert "broken" not in refusal(registry, "engine=x")
    finally:
        del registry.failures["llmkit-broken:x"]


def test_environment_and_argv_are_put_back(registry: Registry, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = list(sys.argv)
    refusal(registry, "cache=x")
    assert sys.argv == before and "HYDRA_FULL_ERROR" not in os.environ
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    jobs(registry)
    assert os.environ["HYDRA_FULL_ERROR"] == "0"


def test_help_lists_foreign_components_on_stdout(
    registry: Registry, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        jobs(registry, "--help")
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert (
        "scheduler: continuous, deadline, fair, mine, prefix_aware, priority, sequential, sjf, static" in out
        and "max_num_batched_tokens: null" in out
    )
    assert err == ""
    assert not list(workdir.iterdir()), "help wrote files"


def test_logs_go_to_standard_error(registry: Registry, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs(registry, "-m", "cache=paged,contiguous")
    out, err = capsys.readouterr()
    assert out == "" and "Launching 2 jobs" in err


def test_entries_of_a_table_can_be_added(registry: Registry, workdir: Path) -> None:
    (job,) = jobs(registry, "+sampling.logit_bias={5:1}")
    assert resolve(registry, job.raw).sampling.logit_bias == {5: 1.0}


def test_stale_components_leave_the_store(registry: Registry, workdir: Path) -> None:
    jobs(registry, "scheduler=mine")
    assert "unknown scheduler 'mine'" in refusal(load_plugins()[0], "scheduler=mine")


def test_yaml_round_trip() -> None:
    data = {"b": {"name": "x", "sizes": [1, 2]}, "a": None}
    assert OmegaConf.to_container(OmegaConf.create(to_yaml(data))) == data
    assert to_yaml(data).startswith("b:")
