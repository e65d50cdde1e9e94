"""Fused layers: which models get them, what they compute, and that a wrong one is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llmkit import SamplingParams
from llmkit.llm import LLM
from llmkit.model import linear as linear_module
from llmkit.model.certify import certified_decoder
from llmkit.model.fused import FusedDecoder, FusedLayer
from llmkit.model.linear import linear, merge
from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.spec import ModelSpec

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FUSABLE: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied_mqa": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama_bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_rope": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "granite": {"attention_multiplier": 0.3},
}
"""Granite without its other multipliers is a Llama: the scale of attention is told to the backend."""
GRANITE = {"model_type": "granite", "attention_multiplier": 0.3}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 128}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "granite_residual": ({**GRANITE, "residual_multiplier": 0.7}, "layer 0 differs by"),
    "granite_embedding": ({**GRANITE, "embedding_multiplier": 2.0}, "differ by"),
    "granite_logits": ({**GRANITE, "logits_scaling": 1.5}, "differ by"),
    "smollm3": ({"no_rope_layers": [1, 0, 1]}, "layer 1 differs by"),
    "gemma2": ({"sliding_window": 8}, "variance_epsilon"),
    "phi3": ({}, "no self_attn.q_proj"),
    "gpt2": (GPT2, "no model.embed_tokens"),
}
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 1e-1}
"""Of the logits' norm; transformers' norms round through float32 even in float64 models."""
PROMPT_LENS = (1, 7, 8, 9, 23)


def tiny(name: str, fields: dict[str, Any], dtype: torch.dtype = torch.float64, is_noised: bool = True) -> LoadedModel:
    """Weights noised until every mistake shows; biases of default initialisation would be zero."""
    config = {"model_type": name, **SHAPE, **fields}
    model = load_model(ModelSpec(name, config=config), dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.module.named_parameters()) if is_noised else ():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.4 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model


def logits_of(model: LoadedModel) -> torch.Tensor:
    """Of the plain transformers model, [30, V]."""
    with torch.inference_mode():
        logits: torch.Tensor = model.as_transformers()(torch.arange(2, 92, 3)[None]).logits[0]
    return logits


def refusal(model: LoadedModel) -> str:
    decoder, reason = certified_decoder(model, 64)
    assert (decoder is None) == bool(reason)
    return reason


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FUSABLE)
def test_certified(name: str, dtype: torch.dtype) -> None:
    """With tame weights; noisy ones are generated from below."""
    assert refusal(tiny(name, FUSABLE[name], dtype, is_noised=False)) == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason_and_left_as_it_was(name: str, dtype: torch.dtype) -> None:
    fields, reason = REFUSED[name]
    model = tiny(name, fields, dtype)
    before = logits_of(model)
    assert reason in refusal(model)
    assert torch.equal(logits_of(model), before)


def test_a_refused_model_runs_general_layers_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "llmkit"):
        llm = LLM(tiny("smollm3", REFUSED["smollm3"][0]), block_size=4, num_blocks=16)
    assert "smollm3 runs transformers' own layers: layer 1 differs by" in caplog.text
    assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))[0].error is None


def swapped(layer: FusedLayer) -> None:
    activation = layer.activation
    layer.activation = lambda gate: activation(gate) * 1.001


def changed(layer: FusedLayer) -> None:
    out = layer.out
    layer.out = lambda x: out(x) + 1e-3 * x[:, :1]


def set_eps(name: str) -> Any:
    """A norm whose epsilon is ten times the model's."""

    def sabotage(layer: FusedLayer) -> None:
        weight, eps = getattr(layer, name)
        setattr(layer, name, (weight, 10 * eps))

    return sabotage


def set_norm_weight(layer: FusedLayer) -> None:
    weight, eps = layer.input_norm
    layer.input_norm = weight * 1.01, eps


@pytest.mark.parametrize("is_noised", [True, False])
@pytest.mark.parametrize("sabotage", [swapped, changed, set_norm_weight, set_eps("input_norm")])
def test_a_wrong_layer_is_refused(sabotage: Any, is_noised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    original = FusedLayer.__init__

    def sabotaged(self: FusedLayer, *args: Any) -> None:
        original(self, *args)
        sabotage(self)

    monkeypatch.setattr(FusedLayer, "__init__", sabotaged)
    assert "layer 0 differs by" in refusal(tiny("llama", {}, torch.bfloat16, is_noised))


def spoil_head(decoder: FusedDecoder) -> None:
    head = decoder._head
    decoder._head = lambda x: head(x).roll(1, -1)


def spoil_positions(decoder: FusedDecoder) -> None:
    decoder._cos = decoder._cos.roll(1, 0)


def spoil_norm(decoder: FusedDecoder) -> None:
    decoder._norm = decoder._norm[0] + 0.2, decoder._norm[1]


def spoil_order(decoder: FusedDecoder) -> None:
    decoder.layers.reverse()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spoil", [spoil_head, spoil_positions, spoil_norm, spoil_order])
def test_a_wrong_network_of_right_layers_is_refused(
    spoil: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FusedDecoder.__init__

    def spoiled(self: FusedDecoder, *args: Any) -> None:
        original(self, *args)
        spoil(self)

    monkeypatch.setattr(FusedDecoder, "__init__", spoiled)
    assert "differ by" in refusal(tiny("llama", {}, dtype))


@pytest.mark.parametrize("name", FUSABLE)
def test_merged_weights_are_views_and_the_original_model_still_works(name: str) -> None:
    model = tiny(name, FUSABLE[name])
    before = logits_of(model)
    assert refusal(model) == ""
    for layer in model.module.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for merged in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
            assert_one_storage([projection.weight for projection in merged])
    assert torch.equal(logits_of(model), before)


def assert_one_storage(weights: list[torch.Tensor]) -> None:
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    assert weights[0].untyped_storage().nbytes() == sum(weight.nbytes for weight in weights)


def test_merging_again_takes_no_second_copy() -> None:
    """As another engine on the same model does."""
    projections: list[Any] = [torch.nn.Linear(6, width, bias=False).requires_grad_(False) for width in (4, 2, 3)]
    wanted = torch.cat([projection.weight for projection in projections])
    once, bias = merge(projections)
    twice, _ = merge(projections)
    assert bias is None
    assert once.data_ptr() == twice.data_ptr() == projections[0].weight.data_ptr()
    assert torch.equal(once, wanted) and torch.equal(twice, wanted)
    assert_one_storage([projection.weight for projection in projections])


def test_merging_other_projections_of_a_stack_copies_them() -> None:
    """Views that do not follow each other are not mistaken for a stack."""
    projections: list[Any] = [torch.nn.Linear(6, width, bias=False).requires_grad_(False) for width in (4, 2, 3)]
    merge(projections)
    for some in ([projections[1], projections[0]], [projections[0], projections[2]]):
        wanted = torch.cat([projection.weight for projection in some])
        assert torch.equal(merge(some)[0], wanted)


PACKS = torch.cpu._is_avx512_bf16_supported() and torch.backends.mkldnn.is_available()


def is_packed(weight: torch.Tensor) -> bool:
    """A packed weight is a copy: what happens to the original later does not reach it."""
    apply = linear(weight, None)
    x = torch.ones(1, weight.shape[1], dtype=weight.dtype)
    before = apply(x)
    weight.zero_()
    return torch.equal(apply(x), before)


def test_only_small_bfloat16_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_packed(torch.ones(64, 32, dtype=torch.bfloat16)) == PACKS
    assert not is_packed(torch.ones(64, 32))
    assert not is_packed(torch.ones(64, 32, dtype=torch.float64))
    monkeypatch.setattr(linear_module, "PACK_LIMIT_BYTES", 64 * 32 * 2 - 1)
    assert not is_packed(torch.ones(64, 32, dtype=torch.bfloat16))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 3, 64])
@pytest.mark.parametrize(("width", "out"), [(32, 97), (320, 512), (864, 320)])
def test_linear_equals_torch(width: int, out: int, num_tokens: int, has_bias: bool) -> None:
    """One rounding to bfloat16 apart at most (2**-8 of the result), packed or not; bit for bit in other types."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, width, generator=generator) for n in (num_tokens, out))
    bias = torch.randn(out, generator=generator) if has_bias else None
    assert torch.equal(linear(weight, bias)(x), F.linear(x, weight, bias))
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16() if bias is not None else None
    wanted = F.linear(x.double(), weight.double(), bias.double() if bias is not None else None)
    got = linear(weight, bias)(x)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), wanted, rtol=2**-8, atol=2**-8)


def generated(model: LoadedModel, fused: bool) -> dict[tuple[str, int], torch.Tensor]:
    """Logits before every sampled token, by request and length. Tokens are forced, so histories are the same."""
    llm = LLM(
        model,
        scheduler={"name": "continuous", "max_num_batched_tokens": 11},
        fused=fused,
        block_size=4,
        num_blocks=32,
    )
    executor: Any = llm.engine.executor
    network, launch, logits, plans = executor.network, executor.launch, {}, []
    assert type(network).__name__ == ("FusedNetwork" if fused else "GeneralNetwork")

    def tapped(*inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = network(*inputs)
        for row, row_logits in zip([r for r in plans[-1].scheduled if r.samples], out, strict=False):
            logits[row.request_id, row.start + row.num_tokens] = row_logits.double().clone()
        return out

    executor.network, executor.launch = tapped, lambda plan: (plans.append(plan), launch(plan))[1]
    prompts = [[(7 * n + i * i) % 97 for i in range(n)] for n in PROMPT_LENS]
    params = [SamplingParams(max_tokens=6, ignore_eos=True, allowed_token_ids=(40 + n,)) for n in PROMPT_LENS]
    outputs = llm.generate(prompts, params)
    assert [output.token_ids for output in outputs] == [(40 + n,) * 6 for n in PROMPT_LENS]
    return logits


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FUSABLE)
def test_fused_and_general_networks_generate_from_equal_logits(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, FUSABLE[name], dtype)
    fused, general = generated(model, fused=True), generated(model, fused=False)
    assert fused.keys() == general.keys() and len(fused) == 6 * len(PROMPT_LENS)
    difference = torch.stack([fused[key] - wanted for key, wanted in general.items()])
    assert float(difference.norm() / torch.stack([*general.values()]).norm()) <= TOLERANCE[dtype]
