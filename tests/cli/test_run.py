"""`llmkit run` on a real, tiny model: what is written, what a sweep shares, and how it ends when something is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import llmkit.llm
from llmkit import LLM, ConfigError, PluginError, load_plugins
from llmkit.cli import main as llmkit_main
from llmkit.compose import run_hydra, store
from llmkit.config import RunConfig, resolve
from llmkit.model.spec import ModelSpec
from llmkit.run import main
from llmkit.runner import Runner

Install = Callable[..., Path]
SMALL = [
    "model=tiny",
    "workload=batch",
    "workload.num_requests=3",
    "workload.prompt_len=[2,6]",
    "workload.max_tokens=4",
]


def runs(folder: Path) -> list[Path]:
    """Every run folder below `folder`."""
    return sorted(path.parent for path in folder.rglob("result.json"))


def test_run_writes_its_folder_and_prints_a_table(
    tiny_model: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "scheduler.max_num_seqs=2"]) == 0
    out, err = capsys.readouterr()
    (run,) = runs(workdir / "outputs")
    result = json.loads((run / "result.json").read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (3, 0, 12)
    assert "3 completed" in out and "Traceback" not in err
    assert f"llmkit: run folder: {run.relative_to(workdir)}" in err
    config = resolve(load_plugins()[0], OmegaConf.to_container(OmegaConf.load(run / "config.yaml")))  # type: ignore[arg-type]
    limits = config.scheduler.settings.model_dump()
    assert config.labels["model"] == "tiny" and limits["max_num_seqs"] == 2
    assert limits["max_num_batched_tokens"] == 2048, "what the device's default came to is not written down"


def test_sweep_loads_shared_weights_once(
    tiny_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loads: list[str] = []
    load = llmkit.llm.load_model

    def counted(spec: ModelSpec, dtype: object, *rest: object) -> object:
        loads.append(str(dtype))
        return load(spec, dtype, *rest)

    monkeypatch.setattr(llmkit.llm, "load_model", counted)
    assert main(["-m", *SMALL, "scheduler=continuous,static", "engine.dtype=float32,float64"]) == 0
    assert loads == ["torch.float32", "torch.float64"]
    found = runs(workdir / "multirun")
    schedulers = ("continuous", "continuous", "static", "static")
    assert [run.name for run in found] == [f"{i}-{name}-paged-tiny-batch" for i, name in enumerate(schedulers)]
    for run in found:
        assert json.loads((run / "result.json").read_text())["completed"] == 3
    table = capsys.readouterr().out.partition("sweep")[2]
    assert [name for name in table.split() if name.endswith("-tiny-batch")] == [run.name for run in found]


def test_large_weights_are_dropped_before_the_next_model_loads(
    tiny_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.runner.KEPT_BYTES", 0)
    runner = Runner(load_plugins()[0])
    seen: list[int] = []
    build = runner._llm

    def watched(config: RunConfig, check: Callable[[object], object]) -> LLM:
        llm = build(config, check)
        seen.append(len(runner._models))
        return llm

    monkeypatch.setattr(runner, "_llm", watched)
    store(runner.registry)
    run_hydra(["-m", *SMALL, "workload.num_requests=1", "engine.dtype=float32,float64"], runner.registry, runner)
    assert seen == [1, 1]


def test_sweep_reports_what_cannot_run_and_runs_the_rest(
    tiny_model: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-m", *SMALL, "scheduler.max_num_seqs=0,2"]) == 2
    err = capsys.readouterr().err
    assert "0-continuous-paged-tiny-batch: scheduler.max_num_seqs=0: Input should be greater" in err
    assert "1 of the sweep's runs failed" in err and "Traceback" not in err
    assert [run.name for run in runs(workdir)] == ["1-continuous-paged-tiny-batch"]
    assert not [*workdir.rglob("0-*")], "a refused run leaves nothing"
    shutil.rmtree(workdir / "multirun")
    assert main(["-m", *SMALL, "scheduler.max_num_seqs=0,-1"]) == 2
    assert not (workdir / "multirun").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["cache=pagd"], "llmkit: unknown cache 'pagd'; did you mean 'paged'? (choices: contiguous, paged, radix)\n"),
        (["scheduler.max_num_seqs=0"], "(allowed: integer, 1 to 4096 or null)\n"),
        (["scheduler.max_num_seqs=true"], "scheduler.max_num_seqs=True: Input should be a number, not true or false ("),
        (["model=hf"], "llmkit: model.path: a value is required\n"),
        (["model=hf", "model.path=/no/such/folder"], "/no/such/folder"),
        (["model=tiny", "workload=trace", "workload.path=/no/such/file"], "/no/such/file"),
        (["model=tiny", "engine.max_model_len=9999"], "engine.max_model_len=9999"),
        (["model=tiny", "plots_dir=/dev/null/x"], "plots_dir=/dev/null/x: /dev/null is not a folder that can be"),
        (
            ["-m", "cache=paged,contiguous", "cache.prefix=off"],
            "cache.prefix: cache=paged has this option, cache=contiguous has not: sweep over both kinds in two runs",
        ),
        (["model=tiny", "engine.num_blocks=100000000"], "engine.num_blocks=100000000"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    tiny_model: Path, workdir: Path, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err and err.startswith("llmkit: ") and err.count("\n") == 1
    assert runs(workdir) == [] and not (workdir / "outputs").exists()


def test_debug_shows_the_traceback(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError):
        main(["cache=pagd", "--debug"])
    with pytest.raises(ConfigError):
        llmkit_main(["--debug", "run", "cache=pagd"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError):
        main(["cache=pagd"])


def test_console_script_passes_everything_on(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert llmkit_main(["run", "cache=pagd"]) == 2
    assert "did you mean 'paged'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        llmkit_main(["run", "--cfg", "job", "--nope"])
    assert caught.value.code == 2


def test_broken_plugin_is_refused(install: Install, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "from llmkit import hookimpl\n@hookimpl\ndef llmkit_registr(registry): ...\n"
    install("foreign_run", source, "llmkit-foreign-run")
    assert main(SMALL) == 2
    assert capsys.readouterr().err.startswith("llmkit: plugin llmkit-foreign-run:foreign_run of llmkit-foreign-run")


def test_a_wrong_file_is_told_before_the_model_loads(
    tiny_model: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unwanted(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(llmkit.llm, "load_model", unwanted)
    for workload, option in (("trace", "path"), ("poisson", "prompt_file")):
        assert main(["model=tiny", f"workload={workload}", f"workload.{option}=/no/such/file"]) == 2
        assert f"llmkit: workload.{option}='/no/such/file' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "before", "says"),
    [
        (["workload=grid", "sampling.n=2"], "llm.load_model", "sampling.n=2: workload grid draws one sample"),
        (["workload=batch", "sampling.n=2"], "llm.load_model", "sampling.n=2: workload batch draws one sample"),
        (["workload=grid", "workload.prompt_len=[999]"], "model.loading._random", "grid needs sequences of 1063"),
        (
            ["workload=poisson", "workload.prompt_len=999", "workload.max_tokens=1", "workload.prompt_file=text"],
            "model.loading._random",
            "workload poisson needs sequences of 1000 tokens (prompt and output)",
        ),
        (["workload=single", "engine.max_model_len=60"], "model.loading._random", "sequences of 384 tokens"),
    ],
)
def test_a_workload_that_cannot_run_is_refused_before_weights_load(
    tiny_model: Path,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    before: str,
    says: str,
) -> None:
    def unwanted(*arguments: object) -> None:
        raise AssertionError(f"{before} was called")

    monkeypatch.setattr(f"llmkit.{before}", unwanted)
    (workdir / "text").write_text("a text to cut prompts from")
    assert main(["model=tiny", *argv]) == 2
    assert says in capsys.readouterr().err


def test_a_workload_of_somebody_else_need_not_check(
    tiny_model: Path, workdir: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    source = """
from llmkit import Settings, hookimpl
from llmkit.workload.protocol import RunOutcome
class Nothing:
    def run(self, target, context):
        return RunOutcome({"title": "nothing"})
@hookimpl
def llmkit_register(registry):
    registry.add("workload", "nothing", lambda settings: Nothing(), Settings, "runs nothing")
"""
    install("foreign_workload", source, "llmkit-foreign-workload")
    assert main(["model=tiny", "workload=nothing", "sampling.n=2"]) == 0
    assert "run folder" in capsys.readouterr().err


def test_a_run_in_which_nothing_completed_is_not_a_success(
    tiny_model: Path, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "bad.jsonl").write_text('{"prompt_token_ids": [999999], "max_tokens": 2}\n' * 2)
    argv = ["model=tiny", "workload=trace", "workload.path=bad.jsonl", "workload.warm_up=false"]
    assert main(argv) == 2
    says = "llmkit: none of the 2 requests completed; refused: token id 999999 in prompt is outside the vocabulary"
    assert says in capsys.readouterr().err
    assert [json.loads((run / "result.json").read_text())["failed"] for run in runs(workdir)] == [2]
    assert main(["-m", *argv, "scheduler=static,continuous"]) == 2
    err = capsys.readouterr().err
    assert err.count("none of the 2 requests completed") == 2 and "2 of the sweep's runs failed" in err


FAULTY = """
from llmkit import ContinuousBatching, Scheduler, hookimpl
class Raises(Scheduler):
    def schedule(self, queue, step):
        raise KeyError("line one\\nline two")
class Inherits(ContinuousBatching):
    def order_waiting(self, waiting, now):
        return None
@hookimpl
def llmkit_register(registry):
    registry.add_scheduler("raises", Raises)
    registry.add_scheduler("inherits", Inherits)
"""


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        ("raises", r"KeyError: 'line one\\nline two' \(faulty\.py, line 5, in schedule\)"),
        ("inherits", r"TypeError: .*NoneType.* \(batching\.py, line \d+, in \w+\)"),
    ],
)
def test_a_plugin_that_fails_is_named_in_one_line_and_its_traceback_kept(
    tiny_model: Path, workdir: Path, install: Install, capsys: pytest.CaptureFixture[str], scheduler: str, says: str
) -> None:
    install("faulty", FAULTY, "llmkit-faulty")
    assert main([*SMALL, f"scheduler={scheduler}"]) == 2
    err = capsys.readouterr().err
    who = r"plugin llmkit-faulty:faulty of llmkit-faulty 1\.0"
    told = re.fullmatch(rf"llmkit: {who} failed: {says}; traceback: (.+)\n", err)
    assert told, err
    assert "Traceback (most recent call last)" in Path(told[1]).read_text()
    with pytest.raises(PluginError) as caught:
        main([*SMALL, f"scheduler={scheduler}", "--debug"])
    assert isinstance(caught.value.__cause__, KeyError | TypeError)
    assert main(["-m", *SMALL, f"scheduler={scheduler},continuous"]) == 2
    err = capsys.readouterr().err
    assert "1 of the sweep's runs failed" in err and "Traceback" not in err
    assert len(runs(workdir / "multirun")) == 2, "what was measured until then is written"
