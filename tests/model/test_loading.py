"""From a description to modules: round trips, one-line errors, determinism."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmkit.errors import ModelError
from llmkit.model.loading import load_model, native_dtype
from llmkit.model.spec import ModelSpec

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": [3, 5],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = load_model(ModelSpec("tiny", config=TINY, seed=1), torch.float32, CPU)
    model.as_transformers().save_pretrained(tmp_path)
    return tmp_path


def refusal(path: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(ModelSpec("hf", path=str(path)), torch.float32, CPU)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (load_model(ModelSpec("m", config=TINY, seed=seed), torch.float32, CPU) for seed in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [model.module.get_parameter("model.layers.1.mlp.down_proj.weight") for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not one.module.training and not weights[0].requires_grad


def test_a_folder_loads_as_it_was_saved(folder: Path) -> None:
    model = load_model(ModelSpec("hf", path=str(folder)), torch.float32, CPU)
    saved = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in saved.named_parameters():
        assert torch.equal(model.module.get_parameter(name), parameter)
    assert model.eos_token_ids == {3, 5} and model.tokenizer is None


def test_a_plain_transformers_model_shares_the_weights(folder: Path) -> None:
    model = load_model(ModelSpec("hf", path=str(folder)), torch.float32, CPU)
    plain = model.as_transformers()
    assert plain.config._attn_implementation == "sdpa"
    pairs = zip(plain.parameters(), model.module.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_no_such_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder).endswith("no *.safetensors file in this folder")


def test_pickled_weights_are_named_and_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "exploded",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert "only pickle weights (pytorch_model.bin)" in refusal(folder)
    assert not (folder / "exploded").exists()


def test_corrupt_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert refusal(folder).startswith(f"cannot load weights from '{folder}'")


def test_missing_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "1 missing or misshapen" in refusal(folder)


def test_a_config_that_makes_no_sense() -> None:
    with pytest.raises(ModelError, match=r"bad config|cannot"):
        load_model(ModelSpec("odd", config={**TINY, "num_attention_heads": "many"}), torch.float32, CPU)


def test_the_native_type_multiplies() -> None:
    dtype = native_dtype(CPU)
    assert dtype in (torch.float32, torch.bfloat16)
    assert torch.mm(torch.ones(2, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype)).dtype is dtype
