"""Backends of other libraries: what they are told, by stand-ins that refuse wrong calls; on a GPU the real ones."""

from __future__ import annotations

from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from llmkit.interfaces.attention import AttentionBackend, AttentionBatch, AttentionRequirements, LayerSpec
from llmkit_attention import flash_attn, flashinfer, varlen
from tests.attention import stand_ins
from tests.attention.sequences import GARBAGE, Rows, Sequences, captured, dense

STEPS: list[Rows] = [
    [("a", 5), ("b", 300)],
    [("a", 1), ("b", 1), ("c", 3)],
    [("c", 9), ("b", 66), ("a", 1)],
    [("b", 1), ("c", 1), ("a", 1)],
]
"""Prompts across pages, beside decodes; chunks behind a cached prefix; decodes only."""
PAGE = 256
BACKENDS: dict[str, type[AttentionBackend]] = {
    "flash_attn": flash_attn.FlashAttnAttention,
    "flash_attn_interface": flash_attn.FlashAttnAttention,
    "flashinfer": flashinfer.FlashInferAttention,
    "varlen": varlen.VarlenAttention,
}
"""By the module that serves them."""
INSTALLED = [name for name in BACKENDS if name != "varlen" and find_spec(name)]
INSTALLED += ["varlen"] if varlen._varlen_attn() is not None else []


def layer(ratio: int = 2, head_dim: int = 64, **options: Any) -> LayerSpec:
    return LayerSpec(2 * ratio, 2, head_dim, **{"scale": head_dim**-0.5, **options})


def on(device: torch.device, backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """The backend on `device` behind an interface on the CPU; it believes in CUDA and half precision."""

    class OnDevice(backend):  # type: ignore[misc, valid-type]
        @classmethod
        def check(cls, requirements: AttentionRequirements) -> list[str]:
            reasons: list[str] = super().check(replace(requirements, device="cuda", dtype="float16"))
            return reasons

        def __init__(self, settings: Any, requirements: AttentionRequirements, dtype: torch.dtype, _: Any) -> None:
            super().__init__(settings, requirements, dtype, device)

        def plan(self, batch: AttentionBatch) -> None:
            values = {field.name: getattr(batch, field.name) for field in fields(batch)}
            super().plan(replace(batch, **{k: v.to(device) for k, v in values.items() if isinstance(v, torch.Tensor)}))

        def forward(self, layer: int, *tensors: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(layer, *(tensor.to(device) for tensor in tensors))
            return out.cpu()

    return OnDevice


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[AttentionBackend]:
    """Each backend over its library's stand-in, on the CPU."""
    name = request.param
    if name == "flash_attn":
        stand_ins.install(monkeypatch, name, **stand_ins.flash_attn_2())
    elif name == "flash_attn_interface":
        stand_ins.install(monkeypatch, name, **stand_ins.flash_attn_3())
    elif name == "flashinfer":
        stand_ins.install(monkeypatch, name, **stand_ins.FLASHINFER)
        monkeypatch.setattr(flashinfer, "_has_kernels", lambda: True)
    else:
        monkeypatch.setattr(varlen, "_varlen_attn", lambda: stand_ins.varlen_attn)
    return on(torch.device("cpu"), BACKENDS[name])


class Filled(Sequences):
    """Slots that are free hold garbage, put there without attending over it."""

    def _spill(self) -> None:
        for pool in self.backend._pools:  # type: ignore[attr-defined]
            pool[:, self._free] = GARBAGE


def sequences(
    backend: type[AttentionBackend], layers: list[LayerSpec], dtype: torch.dtype = torch.float64
) -> Sequences:
    if backend.__mro__[1] is varlen.VarlenAttention:
        layers = [replace(spec, softcap=None) for spec in layers]
    return Filled(backend, layers, dtype, block_size=PAGE, num_blocks=8)


def run(made: Sequences, steps: list[Rows] = STEPS, tolerance: float = 1e-12) -> None:
    for number, rows in enumerate(steps):
        error = made.step(rows, slack=number)
        assert error <= tolerance, f"step {number}, {rows}: {error:.1e}"


QUICK = [(1, None), (2, 1), (6, 40)]
"""Every ratio and every window once; the other pairs are slow."""


@pytest.mark.parametrize(
    ("ratio", "window"),
    [
        pytest.param(ratio, window, marks=[] if (ratio, window) in QUICK else pytest.mark.slow)
        for ratio in (1, 2, 6)
        for window in (None, 1, 40)
    ],
)
def test_heads_and_windows(backend: type[AttentionBackend], ratio: int, window: int | None) -> None:
    run(sequences(backend, [layer(ratio, window=window)]))


def test_layers_that_differ(backend: type[AttentionBackend]) -> None:
    run(sequences(backend, [layer(2), layer(4, 128, window=9), layer(1, softcap=2.0, scale=0.1), layer(2)]))


def test_sequences_go_on_after_waiting_on_the_host(backend: type[AttentionBackend]) -> None:
    made = sequences(backend, [layer(2), layer(4, 128, window=9)])
    run(made, STEPS[:3])
    made.swap("a", "b")
    run(made, STEPS[3:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_row_leaves_nothing_broken_behind(backend: type[AttentionBackend], value: float) -> None:
    made = sequences(backend, [layer(2)])
    made.step([("a", 3)])
    made._grow("a", 1)
    made.backend.plan(made.batch([("a", 1)]))
    made.backend.forward(0, *(torch.full_like(tensor, value) for tensor in made.draw(0, 1)))
    pools: Any = made.backend
    assert all(pool.isfinite().all() for pool in pools._pools)


def test_tokens_without_a_slot_are_stored_nowhere(backend: type[AttentionBackend]) -> None:
    made = sequences(backend, [layer(2)])
    made.step([("a", 3), ("b", 3)])
    pools: Any = made.backend
    before = pools._pools[0][:, :8].clone()
    made._grow("a", 1)
    batch = replace(made.batch([("a", 1)]), slot_mapping=torch.tensor([-1]))
    made.backend.plan(batch)
    made.backend.forward(0, *made.draw(0, 1))
    assert torch.equal(pools._pools[0][:, :8], before)


def test_bytes_per_block(backend: type[AttentionBackend]) -> None:
    made: Any = sequences(backend, [layer(2), layer(4, 128)])
    blocks = sum(pool[:, :8].numel() * pool.itemsize for pool in made.backend._pools)
    assert blocks == 8 * made.backend.bytes_per_block()


def requirements(*layers: LayerSpec, device: str = "cuda", dtype: str = "bfloat16", page: int = PAGE) -> Any:
    return AttentionRequirements(device, dtype, page, layers or (layer(),))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (flash_attn, flashinfer):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(varlen, "_varlen_attn", lambda: None)
    said = [backend.check(requirements()) for backend in BACKENDS.values()]
    assert [reasons[0].split()[0] for reasons in said] == ["flash-attn", "flash-attn", "flashinfer", "torch"]
    assert all(len(reasons) == 1 for reasons in said)


def test_flashinfer_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, "find_spec", lambda name: object() if name == "flashinfer" else None)
    monkeypatch.setattr(flashinfer.shutil, "which", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert flashinfer.FlashInferAttention.check(requirements()) == [
        "flashinfer compiles its kernels, and there is neither nvcc nor flashinfer-jit-cache"
    ]
    monkeypatch.setattr(flashinfer.shutil, "which", lambda name: "/usr/bin/nvcc")
    assert flashinfer.FlashInferAttention.check(requirements()) == []


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        ("flash_attn", requirements(page=64), "block size 64 is not a multiple of 256"),
        ("flash_attn", requirements(device="cpu"), "device cpu is not cuda"),
        ("flash_attn_interface", requirements(layer(2, 20)), "head dimension 20 is not one of 8, 16 to 256"),
        ("flashinfer", requirements(dtype="float32"), "dtype float32 is not one of"),
        ("flashinfer", requirements(layer(2, 96)), "head dimension 96 is not one of 64, 128, 256"),
        ("flashinfer", requirements(LayerSpec(3, 2, 64, 1.0)), "3 query heads do not divide into 2 KV heads"),
        ("varlen", requirements(layer(softcap=3.0)), "soft cap 3.0"),
        ("varlen", requirements(page=16), "block size 16 is not a multiple of 256"),
    ],
)
def test_what_they_cannot_serve(name: str, asked: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn, "find_spec", lambda module: object() if module == name else None)
    monkeypatch.setattr(flashinfer, "find_spec", lambda module: object())
    monkeypatch.setattr(varlen, "_varlen_attn", lambda: stand_ins.varlen_attn)
    said = BACKENDS[name].check(asked)
    assert len(said) == 1 and said[0].startswith(reason)


def test_flash_attn_3_takes_pages_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch, "flash_attn_interface", **stand_ins.flash_attn_3())
    made = Sequences(on(torch.device("cpu"), flash_attn.FlashAttnAttention), [layer(2)], block_size=16, num_blocks=64)
    run(made)


@pytest.mark.cuda
@pytest.mark.parametrize("name", INSTALLED)
def test_the_real_ones_on_a_gpu(name: str) -> None:
    chosen = on(torch.device("cuda"), BACKENDS[name])
    layers = [layer(4, 128), layer(2, 128, window=40), layer(2, 64, softcap=2.0), layer(7, 128)]
    for spec in layers:
        run(sequences(chosen, [spec], torch.bfloat16), STEPS, tolerance=4e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name for name in INSTALLED if name.startswith("flash_attn")])
def test_a_captured_step_serves_other_lengths(name: str) -> None:
    """Of the newest version that is installed, whatever the name."""
    assert find_spec(name)
    spec, rows, bound, device = layer(4, 128), 4, 1024, torch.device("cuda")
    asked = AttentionRequirements("cuda", "bfloat16", PAGE, (spec,))
    made = flash_attn.FlashAttnAttention(flash_attn.FlashAttnAttention.Settings(), asked, torch.bfloat16, device)
    made.allocate(rows * bound // PAGE)
    made._pools[0].normal_()
    table = torch.randperm(rows * bound // PAGE, device=device, dtype=torch.int32).view(rows, -1)
    query, key, value = (torch.randn(rows, heads, 128, device=device).bfloat16() for heads in (8, 2, 2))
    starts, slots = torch.arange(rows + 1, dtype=torch.int32, device=device), torch.full((rows,), -1, device=device)
    lengths = torch.zeros(rows, dtype=torch.int32, device=device)
    static = AttentionBatch(starts, lengths, slots.clone(), table, slots, 1, bound, (1,) * rows, (bound,) * rows)
    assert made.capturable(static)
    graph, out = captured(made, static, query, key, value)
    for now in ([1000, 1, 0, 17], [256, 257, 1024, 513]):
        lengths.copy_(torch.tensor(now))
        last = lengths.long() - 1
        place = table.gather(1, (last.clamp(0) // PAGE)[:, None])[:, 0].long() * PAGE + last.clamp(0) % PAGE
        slots.copy_(torch.where(last < 0, -1, place))
        graph.replay()
        for row, length in enumerate(now):
            pool = made._pools[0][:, table[row].long()].flatten(1, 2)[:, :length].cpu()
            if length:
                wanted = dense(spec, query[row : row + 1].cpu(), pool[0], pool[1])
                assert torch.equal(pool[0, -1], key[row].cpu())
                assert (out[row].cpu() - wanted).abs().max() <= 4e-2
