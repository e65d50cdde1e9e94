"""What a model asks is read from one probe; what does not fit is refused by name, with the reason, before weights."""

from typing import Any

import pytest
from transformers import AutoConfig

from llmkit.errors import ModelError
from llmkit.interfaces.attention import LayerSpec
from llmkit.model.architecture import inspect_architecture

REFUSED = {
    "bloom": "takes no position_ids",
    "mpt": "takes no position_ids",
    "falcon": "takes no custom function",
    "gptj": "takes no custom function",
    "codegen": "takes no custom function",
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
    "diffllama": "attends more than once",
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
