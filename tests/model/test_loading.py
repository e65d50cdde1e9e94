"""From a description to modules: round trips, one-line errors, determinism."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from llmkit import LLM, FinishReason, SamplingParams
from llmkit.errors import CapacityError, ModelError
from llmkit.model import loading
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
    before, others = torch.random.get_rng_state(), (random.getstate(), np.random.get_state()[1].tolist())
    one, same, other = (load_model(ModelSpec("m", config=TINY, seed=seed), torch.float32, CPU) for seed in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == others
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


@pytest.mark.parametrize("max_shard_size", ["10GB", "10KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_called_hf_says_what_the_saved_one_says(tmp_path: Path, tied: bool, max_shard_size: str) -> None:
    spec = ModelSpec("tiny", config={**TINY, "tie_word_embeddings": tied}, seed=1)
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=0)
    one = LLM(spec, dtype="float64", num_blocks=8)
    one.naive_model().save_pretrained(tmp_path, max_shard_size=max_shard_size)
    other = LLM({"name": "hf", "path": str(tmp_path)}, dtype="float64", num_blocks=8)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "10KB")
    first, second = (llm.generate([5, 6, 7], greedy)[0] for llm in (one, other))
    assert first.token_ids == second.token_ids
    assert [token.logprob for token in first.logprobs] == pytest.approx([token.logprob for token in second.logprobs])


def test_no_such_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such folder"


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(folder).startswith(f"cannot read a model config from '{folder}': ")


@pytest.mark.parametrize("text", ["{broken", "[]", '{"model_type": "nothing_like_this"}', "{}"])
def test_a_config_that_cannot_be_read(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert refusal(folder).startswith(f"cannot read a model config from '{folder}': ")


def test_code_beside_the_weights_is_never_run(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    assert refusal(folder).startswith(f"cannot read a model config from '{folder}': ")
    assert not (folder / "ran").exists()


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
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "1 missing or misshapen" in refusal(folder)


def test_misshapen_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert refusal(folder).startswith(f"cannot load weights from '{folder}'")


def test_a_missing_shard(tmp_path: Path) -> None:
    model = load_model(ModelSpec("tiny", config=TINY), torch.float32, CPU)
    model.as_transformers().save_pretrained(tmp_path, max_shard_size="10KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    assert refusal(tmp_path).startswith(f"cannot load weights from '{tmp_path}'")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_attention_heads": "many"}, "model 'odd': bad config: "),
        ({"model_type": "nothing_like_this"}, "model 'odd': bad config: "),
        ({"model_type": None}, "model 'odd': the config names no model_type"),
        ({"num_attention_heads": 0}, "model 'odd': bad config: "),
    ],
)
def test_a_config_that_makes_no_sense(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(ModelSpec("odd", config={**TINY, **fields}), torch.float32, CPU)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_without_a_tokenizer_text_is_refused_and_ids_are_not(tmp_path: Path, model_type: str) -> None:
    """Transformers would make up a GPT-2 tokenizer without a vocabulary."""
    model = load_model(ModelSpec("tiny", config={**TINY, "model_type": model_type}), torch.float32, CPU)
    model.as_transformers().save_pretrained(tmp_path)
    llm = LLM({"name": "hf", "path": str(tmp_path)}, dtype="float32", num_blocks=8)
    text, ids = llm.generate(["hello", [5, 6]], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    assert text.error == "model 'hf' has no tokenizer; give prompts as token ids"
    assert ids.finish_reason is FinishReason.LENGTH and ids.text == ""


def test_a_broken_tokenizer_is_an_error(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{broken")
    assert refusal(folder).startswith(f"cannot load the tokenizer in '{folder}': ")


def test_end_tokens_outside_the_vocabulary_end_nothing() -> None:
    model = load_model(ModelSpec("m", config={**TINY, "eos_token_id": [3, 50256]}), torch.float32, CPU)
    assert model.eos_token_ids == {3}


def test_weights_that_do_not_fit_are_refused_before_they_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_bytes", lambda device, share: 2**30)
    monkeypatch.setattr(loading, "_random", lambda *_: pytest.fail("weights were made"))
    large = {**TINY, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 8}
    with pytest.raises(CapacityError) as caught:
        load_model(ModelSpec("large", config=large), torch.bfloat16, CPU)
    assert str(caught.value) == "the weights of model 'large' need 3.8 GiB on cpu, but 1.0 GiB are free"


def test_loading_says_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level = loading.transformers_logging.get_verbosity()
    load_model(ModelSpec("odd", config={**TINY, "eos_token_id": 50256}), torch.float32, CPU)
    load_model(ModelSpec("hf", path=str(folder)), torch.float32, CPU)
    assert capfd.readouterr() == ("", "")
    assert loading.transformers_logging.get_verbosity() == level


def test_weights_come_in_the_asked_type(folder: Path) -> None:
    model = load_model(ModelSpec("hf", path=str(folder)), torch.bfloat16, CPU)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}
    saved = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(model.module.get_parameter("model.norm.weight"), saved.bfloat16())


@pytest.mark.parametrize("has_bf16", [False, True])
def test_the_native_type_of_a_cpu(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    assert native_dtype(CPU) is (torch.bfloat16 if has_bf16 else torch.float32)


def test_the_native_type_multiplies() -> None:
    dtype = native_dtype(CPU)
    assert dtype in (torch.float32, torch.bfloat16)
    assert torch.mm(torch.ones(2, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype)).dtype is dtype


MIXTRAL = {**TINY, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator returned."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.num_elements = max(self.num_elements, out.numel())
        return out


def test_experts_are_not_copied_for_every_token() -> None:
    """In layers of transformers' own, where the probe needs just that."""
    llm = LLM(
        ModelSpec("experts", config=MIXTRAL), dtype="float32", device="cpu", fused=False, num_blocks=4, block_size=16
    )
    weights = max(parameter.numel() for parameter in llm.model.module.parameters())
    with Largest() as largest:
        (output,) = llm.generate([[7] * 60], SamplingParams(max_tokens=1))
    assert output.error is None and 60 * 48 <= largest.num_elements <= 2 * weights


def test_experts_in_float64(tmp_path: Path) -> None:
    saved = load_model(ModelSpec("experts", config=MIXTRAL, seed=1), torch.float64, CPU)
    saved.as_transformers().save_pretrained(tmp_path)
    params, tokens = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True), []
    for model in (saved, load_model(ModelSpec("hf", path=str(tmp_path)), torch.float64, CPU)):
        (output,) = LLM(model, fused=False).generate([[7, 8, 9]], params)
        assert output.error is None
        tokens.append(output.token_ids)
    assert tokens[0] == tokens[1]
