"""Fused layers: which models get them, what they compute, and that a wrong one is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from llmkit import SamplingParams
from llmkit.llm import LLM
from llmkit.model.certify import certified_decoder
from llmkit.model.fused import FusedDecoder, FusedLayer
from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.spec import ModelSpec
from tests.model.test_linear import assert_one_storage

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
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 4.0, 6.0, 9.0],
    "original_max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
FUSABLE: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied_mqa": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama_bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_rope": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "granite": {"attention_multiplier": 0.3},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {},
    "phi3_partial_rotary": {"model_type": "phi3", "rope_parameters": PARTIAL_ROPE},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    "phi3_longrope": {"model_type": "phi3", "rope_parameters": LONG_ROPE},
    "dots1": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
}
"""Granite without its other multipliers is a Llama: the scale of attention is told to the backend."""
GRANITE = {"model_type": "granite", "attention_multiplier": 0.3}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 128}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "granite_residual": ({**GRANITE, "residual_multiplier": 0.7}, "layer 0 differs by"),
    "granite_embedding": ({**GRANITE, "embedding_multiplier": 2.0}, "differ by"),
    "granite_logits": ({**GRANITE, "logits_scaling": 1.5}, "differ by"),
    "smollm3": ({"no_rope_layers": [1, 0, 1]}, "layer 1 differs by"),
    "glm4": ({}, "layer 0 differs by"),
    "phimoe": ({}, "no attribute 'gate'"),
    "olmo2": ({}, "no input_layernorm"),
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


def test_layers_of_a_kind_that_has_no_rotary_table_are_left_general() -> None:
    model = tiny(
        "gemma3_text", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, torch.float32
    )
    model.module.model.config.layer_types[-1] = "somewhere"
    assert "KeyError: 'somewhere'" in refusal(model)


def test_a_refused_model_runs_general_layers_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "llmkit"):
        llm = LLM(tiny("smollm3", REFUSED["smollm3"][0]), block_size=4, num_blocks=16)
    assert "smollm3 runs transformers' own layers: layer 1 differs by" in caplog.text
    assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))[0].error is None


def swapped(layer: FusedLayer) -> None:
    mlp: Any = layer.feed_forward
    activation = mlp.activation
    mlp.activation = lambda gate: activation(gate) * 1.001


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
    decoder._tables = {kind: (cos.roll(1, 0), sin) for kind, (cos, sin) in decoder._tables.items()}


def spoil_norm(decoder: FusedDecoder) -> None:
    decoder._norm = decoder._norm[0] + 0.2, decoder._norm[1]


def spoil_order(decoder: FusedDecoder) -> None:
    decoder.layers.reverse()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("spoil", [spoil_head, spoil_positions, spoil_norm, spoil_order])
def test_a_wrong_network_of_right_layers_is_refused(
    spoil: Any, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FusedDecoder.__init__

    def spoiled(self: FusedDecoder, *args: Any) -> None:
        original(self, *args)
        spoil(self)

    monkeypatch.setattr(FusedDecoder, "__init__", spoiled)
    assert "differ by" in refusal(tiny(name, FUSABLE[name], dtype))


@pytest.mark.parametrize("name", FUSABLE)
def test_merged_weights_are_views_and_the_original_model_still_works(name: str) -> None:
    model = tiny(name, FUSABLE[name])
    before = logits_of(model)
    assert refusal(model) == ""
    for layer in model.module.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = [[attention, "q_proj", "k_proj", "v_proj"], [mlp, "gate_proj", "up_proj"]]
        for module, *names in parts:
            if hasattr(module, names[0]):
                assert_one_storage([getattr(module, name).weight for name in names])
    assert torch.equal(logits_of(model), before)


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
    is_routed = "num_experts_per_tok" in FUSABLE[name] and dtype is torch.bfloat16
    allowed = (2 if is_routed else 1) * TOLERANCE[dtype]  # rounding may choose other experts
    difference = torch.stack([fused[key] - wanted for key, wanted in general.items()])
    assert float(difference.norm() / torch.stack([*general.values()]).norm()) <= allowed
