"""What transformers imports on the way to a model, and that what waited is all there afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("accelerate", "librosa", "sklearn", "torchaudio", "torchvision")
LATE = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.fx.experimental.symbolic_shapes")
LATE += ("sympy", "transformers.loss.loss_d_fine", "transformers.models", "rich", "matplotlib")
RUN = """
import json, sys
from llmkit import LLM, SamplingParams
llm = LLM({model!r})
[output] = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, temperature=0.0))
assert output.error is None, output.error
"""
LOADED = "print(json.dumps([name for name in {names!r} if name in sys.modules]))"


def run(code: str, *folders: Path) -> str:
    """Last line that `code` prints in a process of its own, which finds packages in `folders` too."""
    script = f"import sys\nsys.path[:0] = {[str(folder) for folder in folders]}\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder of packages that cannot be imported, but are installed as far as anybody can see."""
    for name in HEAVY:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('{name} was imported')\n")
        (tmp_path / f"{name}-99.0.dist-info").mkdir()
        (tmp_path / f"{name}-99.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 99.0\n")
    return tmp_path


@pytest.mark.parametrize(
    "model",
    [pytest.param("embedded", id="checkpoint", marks=pytest.mark.slow), pytest.param("tiny", id="random weights")],
)
def test_the_first_token_needs_no_compiler_and_no_package_that_transformers_happens_to_find(
    model: str, installed: Path, tiny_model: Path
) -> None:
    assert json.loads(run(RUN.format(model=model) + LOADED.format(names=LATE + HEAVY), installed, tiny_model)) == []


def test_what_waited_is_there_when_somebody_wants_it(tiny_model: Path) -> None:
    later = """
import torch, transformers
from torch.distributed.tensor import DTensor, Shard
from transformers.models import qwen3
from transformers import masking_utils, modeling_utils
assert isinstance(DTensor, type) and isinstance(Shard(0), Shard)
assert transformers.models.qwen3 is qwen3 and transformers.models.LlamaConfig().model_type == "llama"
assert not isinstance(1, masking_utils.BlockMask)
several = torch.compile(lambda x: x + 1 if x.shape[0] > 2 else x - 1, backend="eager", dynamic=True)
assert several(torch.ones(2)).tolist() == [0.0, 0.0] and several(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv
assert sympy.solve("x**2 - 4") == [-2, 2] and isinstance(ShapeEnv, type)
from torch._dynamo import trace_rules
functions = [getattr(f, "fget", f) for f in vars(modeling_utils.PreTrainedModel).values()]
assert any(map(trace_rules.is_callable_allowed, functions)), "nothing is marked for the compiler"
print("all there")
"""
    assert run(RUN.format(model="tiny") + later, tiny_model) == "all there"


def test_a_model_whose_methods_are_documented_by_types_that_wait() -> None:
    """Gemma 3 brings classes for images, and transformers asks for bases of what annotates their methods."""
    code = """
import torch
from llmkit.model.loading import load_model
from llmkit.model.spec import ModelSpec
sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
sizes |= dict(num_attention_heads=4, head_dim=8)
config = {"model_type": "gemma3_text", "num_key_value_heads": 2, **sizes}
print(type(load_model(ModelSpec("tiny", config=config), torch.float32, torch.device("cpu")).module).__name__)
"""
    assert run(code) == "Gemma3ForCausalLM"


def test_packages_are_lazy_inside_the_block_only_and_absent_ones_stay_absent(tmp_path: Path) -> None:
    (tmp_path / "librosa").mkdir()
    (tmp_path / "librosa" / "__init__.py").write_text("rate = 7\ndef load(): return 8\nclass Sound: ...\n")
    code = """
import gc, importlib.util
from llmkit.model import lean
from llmkit.model.lean import lean_imports
lean.DEFERRED += ("not_there",)
with lean_imports():
    import librosa as waiting
    from librosa import Sound, load
    with lean_imports():
        from librosa import rate
    assert importlib.util.find_spec("not_there") is None and not gc.isenabled()
    try:
        import not_there
    except ImportError:
        pass
    assert not isinstance(3, Sound) and "librosa" in sys.modules
assert "librosa" not in sys.modules and gc.isenabled()
assert load() == 8 and sys.modules["librosa"] is not waiting
import librosa
class Loud(Sound): ...
assert issubclass(Loud, librosa.Sound) and isinstance(librosa.Sound(), Sound) and issubclass(librosa.Sound, Sound)
print("fine")
"""
    assert run(code, tmp_path) == "fine"


def test_a_deferred_name_that_is_used_inside_the_block_is_real_from_then_on(tmp_path: Path) -> None:
    (tmp_path / "librosa").mkdir()
    (tmp_path / "librosa" / "__init__.py").write_text("def load(): return 8\n")
    code = """
from llmkit.model.lean import lean_imports
with lean_imports():
    from librosa import load
    assert load() == 8
    import librosa
    assert librosa.load is sys.modules["librosa"].load and librosa.load.__code__
assert sys.modules["librosa"] is librosa
print("fine")
"""
    assert run(code, tmp_path) == "fine"


def test_meta_kernels_need_no_sympy_and_have_it_as_soon_as_numbers_are_symbols() -> None:
    code = """
import sys, torch
from llmkit.model.lean import lean_imports
with lean_imports():
    import sympy as early
    from torch.fx.experimental import symbolic_shapes as shapes
    from torch.fx.experimental.symbolic_shapes import guard_or_false, is_nested_int, sym_and, sym_eq, sym_or
    x = torch.empty(3, 2, device="meta").mul(2).add(torch.empty(2, device="meta"))
    assert x.shape == (3, 2) and x.normal_().sum(0).shape == (2,)
    assert guard_or_false(True) and not guard_or_false(False) and not is_nested_int(3)
    assert sym_eq([3, 2], x.shape) and not sym_eq(x.shape, (3, 3)) and sym_eq(3, 3) and not sym_eq(3, 2)
    assert sym_and(True, True) and not sym_and(True, False) and sym_or(False, True) and not sym_or(False, False)
    assert not isinstance(x, early.Basic) and not hasattr(early, "__version__") and not hasattr(shapes, "__file__")
    try:
        torch.empty(3, device="meta") + torch.empty(2, device="meta")
    except RuntimeError as error:
        assert "broadcast" in str(error), error
    else:
        raise AssertionError("sizes that do not fit were taken")
    seen = []
    def compiler(graph, inputs):
        seen.extend(s for s in inputs if isinstance(s, torch.SymInt))
        return graph
    double = torch.compile(lambda x: x * 2 if x.shape[0] > 4 else x, backend=compiler, dynamic=True)
    assert double(torch.ones(5)).sum() == 10 and double(torch.ones(2)).sum() == 2
    size = seen[0]
    assert isinstance(size.node.expr, early.Symbol) and early.true is sys.modules["sympy"].true
    assert isinstance(sym_eq(size, 7), torch.SymBool) and guard_or_false(size > 4)
print("fine")
"""
    assert run(code) == "fine"


def test_what_is_made_in_the_block_counts_as_old_and_what_is_frozen_stays_frozen() -> None:
    code = """
import gc
from llmkit.model.lean import lean_imports
with lean_imports():
    made = []
assert any(thing is made for thing in gc.get_objects(generation=2)) and not gc.get_freeze_count()
more = [[] for _ in range(1000)]
gc.freeze()
frozen = gc.get_freeze_count()
with lean_imports():
    pass
assert gc.get_freeze_count() == frozen > 0 and gc.isenabled()
print("fine")
"""
    assert run(code) == "fine"


def test_transformers_offers_the_same_names() -> None:
    names = "print(sorted(transformers._class_to_module.items()))"
    quick = "assert transformers.utils.import_utils.fetch__all__.__module__ == 'llmkit.model.import_hooks'\n"
    assert run("import llmkit.llm, transformers\n" + quick + names) == run(f"import transformers\n{names}")


def test_a_distribution_is_told_by_its_name_or_looked_up_among_all() -> None:
    code = """
import importlib.metadata
from llmkit.model.lean import lean_imports
every = importlib.metadata.packages_distributions()
with lean_imports():
    lazy = importlib.metadata.packages_distributions()
assert lazy["torch"] == every["torch"] and lazy["yaml"] == every["yaml"] and lazy.get("librosa", []) == []
assert dict(lazy) == every and importlib.metadata.packages_distributions() == every
print("fine")
"""
    assert run(code) == "fine"
