"""From a model's description to modules on a device, with every mistake told in one line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from llmkit.errors import CapacityError, ConfigError, ModelError, first_line
from llmkit.model.architecture import Architecture, inspect_architecture
from llmkit.model.lean import lean_imports
from llmkit.model.memory import free_bytes
from llmkit.model.routing import IMPLEMENTATION
from llmkit.model.spec import ModelSpec

with lean_imports():
    import transformers
    from transformers import PretrainedConfig

    # Transformers is typed in parts only, and which parts changes between its releases.
    AutoConfig: Any = transformers.AutoConfig
    AutoModelForCausalLM: Any = transformers.AutoModelForCausalLM
    transformers_logging: Any = transformers.utils.logging

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(slots=True)
class DescribedModel:
    """What is known of a model before its weights load."""

    name: str
    config: PretrainedConfig
    architecture: Architecture
    dtype: torch.dtype
    device: torch.device


@dataclass(slots=True)
class LoadedModel(DescribedModel):
    """A transformers causal LM in eval mode, its tokenizer if there is one, and what it asks of the engine."""

    module: torch.nn.Module
    tokenizer: Any
    eos_token_ids: frozenset[int]
    fused: dict[int, Any] = field(default_factory=dict)

    def as_transformers(self) -> Any:
        """A plain transformers model over the same weights, with its own KV cache.

        Its attention is torch's SDPA, or transformers' own where that cannot do what the model asks (softcap).
        """
        tensors = [*self.module.parameters(), *self.module.buffers()]
        module: Any = deepcopy(self.module, {id(tensor): tensor for tensor in tensors})
        has_softcap = any(layer.softcap for layer in self.architecture.layers.values())
        module.set_attn_implementation("eager" if has_softcap else "sdpa")
        return module


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """The transformers config of `spec`, without touching weights."""
    if spec.path is None:
        fields = dict(spec.config)
        model_type = fields.pop("model_type", None)
        if model_type is None:
            raise ModelError(f"model {spec.name!r}: the config names no model_type")
        try:
            built: PretrainedConfig = AutoConfig.for_model(model_type, **fields)
            return built
        except Exception as error:
            raise ModelError(f"model {spec.name!r}: bad config: {first_line(error)}") from error
    is_folder = Path(spec.path).is_dir()
    if not is_folder and not HUB_ID.fullmatch(spec.path):
        raise ModelError(f"{spec.path}: no such folder")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(spec.path, trust_remote_code=False)
        return config
    except Exception as error:
        hint = "" if is_folder else " (no such folder, and not a reachable hub id)"
        raise ModelError(f"cannot read a model config from {spec.path!r}{hint}: {first_line(error)}") from error


def load_model(
    spec: ModelSpec,
    dtype: torch.dtype | None,
    device: torch.device,
    checks: Iterable[Callable[[DescribedModel], object]] = (),
) -> LoadedModel:
    """Check the architecture, then load. `dtype=None` takes the fastest one the device computes natively.

    `checks` raise what speaks against the model before its weights load.
    """
    with _quiet_transformers(), lean_imports(), _context(device):
        config = load_config(spec)
        architecture = inspect_architecture(config)
    dtype = dtype or native_dtype(device)
    for check in checks:
        check(DescribedModel(spec.name, config, architecture, dtype, device))
    with _quiet_transformers(), lean_imports():
        _check_room(spec, architecture.num_parameters * dtype.itemsize, device)
        try:
            module: Any = _checkpoint(spec, dtype, device) if spec.path else _random(config, dtype, device, spec)
        except torch.OutOfMemoryError as error:
            raise CapacityError(f"model {spec.name!r} does not fit on {device}: {first_line(error)}") from error
        tokenizer = _tokenizer(spec)
    module.eval().requires_grad_(False)
    if dtype is torch.float64 and hasattr(module, "set_experts_implementation"):
        module.set_experts_implementation("batched_mm")  # torch's grouped product, which others take, knows no float64
    eos = _eos(module, architecture.vocab_size)
    # There is no padding; some models would look for it in every step. Past the config's check, which may want an int.
    object.__setattr__(module.config, "pad_token_id", None)
    return LoadedModel(spec.name, config, architecture, dtype, device, module, tokenizer, eos)


@contextmanager
def _context(device: torch.device) -> Iterator[None]:
    """Have the context of a GPU made meanwhile, and Triton hash itself, which it does before it looks into its cache.

    If that fails the first use says why.
    """
    if device.type != "cuda":
        yield
        return
    with ThreadPoolExecutor(2) as pool:
        pool.submit(lambda: torch.zeros(1, device=device))
        pool.submit(lambda: import_module("triton.runtime.cache").triton_key())
        yield


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Transformers reports what it loads on stderr; llmkit raises what matters."""
    level, has_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bar:
            transformers_logging.enable_progress_bar()


def _check_room(spec: ModelSpec, needed: int, device: torch.device) -> None:
    free = free_bytes(device, 1.0)
    if needed > free:
        raise CapacityError(
            f"the weights of model {spec.name!r} need {needed / 2**30:.1f} GiB on {device}, "
            f"but {free / 2**30:.1f} GiB are free"
        )


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" takes CUDA if there is one. ConfigError if CUDA is asked for in vain."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("engine.device=cuda: torch finds no CUDA device; use engine.device=cpu")
    return torch.device(name if name != "auto" else "cuda" if has_cuda else "cpu")


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.bfloat16 if has_bf16 is not None and has_bf16() else torch.float32


def _random(config: PretrainedConfig, dtype: torch.dtype, device: torch.device, spec: ModelSpec) -> torch.nn.Module:
    """Seeded random weights, the same on every run on the same kind of device; the global RNG is left alone."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(spec.seed)
        module: torch.nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=IMPLEMENTATION
        )
    return module


def _checkpoint(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    assert spec.path is not None
    folder = Path(spec.path)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        pickles = [f.name for f in sorted(folder.iterdir()) if f.suffix in PICKLE_SUFFIXES]
        if pickles:
            raise ModelError(f"{spec.path}: only pickle weights ({pickles[0]}); llmkit loads safetensors only")
        raise ModelError(f"{spec.path}: no *.safetensors file in this folder")
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            spec.path,
            dtype=dtype,
            attn_implementation=IMPLEMENTATION,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load weights from {spec.path!r}: {first_line(error)}") from error
    bad = [*report["missing_keys"], *report["mismatched_keys"]]
    if bad:
        raise ModelError(f"cannot load weights from {spec.path!r}: {len(bad)} missing or misshapen, first {bad[0]}")
    loaded: torch.nn.Module = module.to(device)
    return loaded


def _tokenizer(spec: ModelSpec) -> Any:
    """The tokenizer beside the weights, or None: such a model takes token ids only.

    Without any of its files transformers would make up an empty one for some architectures.
    """
    folder = None if spec.path is None else Path(spec.path)
    if folder is None or (folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES)):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(spec.path, trust_remote_code=False)
    except Exception as error:
        if folder.is_dir():
            raise ModelError(f"cannot load the tokenizer in {spec.path!r}: {first_line(error)}") from error
        return None


def _eos(module: Any, vocab_size: int) -> frozenset[int]:
    """Ids that end a sequence; defaults of some configs lie outside a small vocabulary and can never be sampled."""
    eos = module.generation_config.eos_token_id
    ids = eos if isinstance(eos, list | tuple) else (eos,)
    return frozenset(token_id for token_id in ids if token_id is not None and 0 <= token_id < vocab_size)
