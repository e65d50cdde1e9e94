"""What a model asks is read from one probe; what does not fit is refused by name, with the reason, before weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, masking_utils

from llmkit.errors import ModelError
from llmkit.interfaces.attention import LayerSpec
from llmkit.model.architecture import _window, inspect_architecture
from llmkit.model.loading import load_model
from llmkit.model.routing import describe_mask
from llmkit.model.spec import ModelSpec

REFUSED = {
    "bloom": "takes no position_ids",
    "mpt": "takes no position_ids",
    "falcon": "takes no custom function",
    "gpt_neo": "takes no custom function",
    "rembert": "takes no custom function",
    "mamba": "linear_attention",
    "rwkv": "recurrent or convolutional state",
    "jamba": "linear_attention",
    "falcon_h1": "hybrid",
    "qwen3_next": "linear_attention",
    "deepseek_v3": "latent attention",
    "gemma3n_text": "share their keys and values",
    "llama4_text": "chunked_attention",
    "gpt_oss": "s_aux",
    "t5": "encoder-decoder",
    "bert": "not causal",
    "xlnet": "takes no position_ids",
    "vit": "no causal LM class",
    "deepseek_v32": "(indexed|sparse)_attention",
    "moshi": "cache forgets keys that their mask shows",
    "doge": "build their own attention mask",
    "mimo_v2_flash": "keys of 192 and values of 128",
    "gemma4_unified": "mask depends on more than positions",
    "diffllama": "attends more than once",
    "jetmoe": r": their forward reads tensor values, which are unknown before weights load$",
    "xlm": r": their forward reads tensor values, which are unknown before weights load$",
    "musicgen": r": their config holds several text models$",
    "xmod": r": transformers says: Input language unknown",
}
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def config(model_type: str, **fields: Any) -> Any:
    return AutoConfig.for_model(model_type, **fields)


@pytest.mark.parametrize(("model_type", "reason"), REFUSED.items())
@pytest.mark.filterwarnings("ignore")
def test_refused_by_name_with_the_reason(model_type: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        inspect_architecture(config(model_type))
    message = str(caught.value)
    assert message.startswith(f"cannot run {model_type} models") and "\n" not in message


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("falcon", {"alibi": True}, "ALiBi"),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "conv"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
        ("llama", {"is_encoder_decoder": True}, "encoder-decoder"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "not causal"),
        ("llama", {"is_causal": False}, "not causal"),
    ],
)
def test_refused_for_what_the_config_switches_on(model_type: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=f"cannot run {model_type} models: .*{reason}"):
        inspect_architecture(config(model_type, **fields))


def test_refused_before_weights_are_looked_at(tmp_path: Path) -> None:
    config("deepseek_v3").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"^cannot run deepseek_v3 models: latent attention"):
        load_model(ModelSpec("hf", path=str(tmp_path)), torch.float32, torch.device("cpu"))


def test_a_window_that_only_the_mask_knows() -> None:
    found = inspect_architecture(config("phimoe", **SMALL, num_key_value_heads=2, sliding_window=7))
    assert {layer.window for layer in found.layers.values()} == {7}


@pytest.mark.parametrize(("asked", "window"), [(131072, 131072), (1 << 24, None)])
def test_wide_windows(asked: int, window: int | None) -> None:
    """One that no context reaches is none."""
    found = inspect_architecture(config("mistral", **SMALL, num_key_value_heads=2, sliding_window=asked))
    assert {layer.window for layer in found.layers.values()} == {window}


@pytest.mark.parametrize(
    ("rule", "window"),
    [
        (masking_utils.causal_mask_function, None),
        (masking_utils.sliding_window_causal_mask_function(5), 5),
        (masking_utils.sliding_window_causal_mask_function(1), 1),
    ],
)
def test_a_mask_is_causal_or_slides(rule: Any, window: int | None) -> None:
    assert _window(describe_mask(rule, q_length=2, kv_length=2), None) == window


@pytest.mark.parametrize(
    ("rule", "asked", "reason"),
    [
        (masking_utils.bidirectional_mask_function, None, "neither causal nor a sliding window"),
        (masking_utils.chunked_causal_mask_function(8, torch.zeros(1)), None, "neither causal nor a sliding window"),
        (masking_utils.padding_mask_function(torch.ones(1, 2)), None, "depends on more than positions"),
        (masking_utils.sliding_window_causal_mask_function(5), 6, "a window of 6, their mask shows 5"),
        (masking_utils.causal_mask_function, 6, "a window of 6, their mask shows all"),
    ],
)
def test_other_masks_are_refused(rule: Any, asked: int | None, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        _window(describe_mask(rule, q_length=2, kv_length=2), asked)


def test_longrope_reaches_as_far_as_its_short_factors() -> None:
    """Beyond, one long sequence would change the rotation of every other one in the batch."""
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    limits = {"max_position_embeddings": 4096, "original_max_position_embeddings": 96, "pad_token_id": None}
    found = inspect_architecture(config("phi3", **SMALL, **limits, num_key_value_heads=2, rope_parameters=rope))
    assert found.max_model_len == 96


def test_parameters_are_counted() -> None:
    model = load_model(ModelSpec("m", config={"model_type": "qwen2", **SMALL}), torch.float32, torch.device("cpu"))
    assert model.architecture.num_parameters == sum(parameter.numel() for parameter in model.module.parameters())


def test_options_that_only_travel_through_attention_do_not_matter() -> None:
    found = inspect_architecture(config("got_ocr2", text_config={"model_type": "qwen2", **SMALL}))
    assert len(found.layers) == 2


def test_layers_are_what_the_config_says() -> None:
    found = inspect_architecture(config("llama", **SMALL, num_key_value_heads=2, max_position_embeddings=96))
    assert list(found.layers) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert set(found.layers.values()) == {LayerSpec(4, 2, 8, 8**-0.5)}
    assert (found.vocab_size, found.max_model_len) == (64, 96)


def test_windows_softcaps_and_scales_are_seen_layer_by_layer() -> None:
    found = inspect_architecture(
        config(
            "gemma2",
            **SMALL,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=7,
            attn_logit_softcapping=20.0,
            query_pre_attn_scalar=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    )
    sliding, full = found.layers.values()
    assert sliding == LayerSpec(4, 2, 8, 0.5, window=7, softcap=20.0)
    assert full == LayerSpec(4, 2, 8, 0.5, window=None, softcap=20.0)


def test_big_models_are_probed_without_their_weights() -> None:
    found = inspect_architecture(
        config("llama", hidden_size=16384, intermediate_size=53248, num_hidden_layers=4, num_attention_heads=128)
    )
    assert found.num_parameters > 10**10
