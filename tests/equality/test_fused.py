"""The fused network: who gets one, and that it is as good as transformers' own layers in every dtype."""

from __future__ import annotations

import pytest
import torch

from llmkit.llm import LLM
from llmkit.model.certify import certified_decoder
from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.spec import ModelSpec
from tests.equality.runs import BLOCK_SIZE, GREEDY, ROOMY, Tap, prompts, reference
from tests.equality.zoo import SHAPE, ZOO, noised, tiny_model

FUSED = {"llama", "llama_mha_tied", "llama_mqa", "llama_scaled_rope", "qwen2", "qwen3", "mistral"}
FUSED |= {"gemma2", "gemma3_text", "phi3", "phi3_partial_rotary", "mixtral", "qwen3_moe", "qwen2_moe"}


@pytest.mark.parametrize("name", ZOO)
def test_llama_shaped_models_are_fused_and_no_others(name: str) -> None:
    decoder, reason = certified_decoder(tiny_model(name), 64)
    assert (decoder is not None) == (name in FUSED)
    assert bool(reason) == (name not in FUSED)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-5), (torch.float32, 2e-4)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "phi3_partial_rotary"])
def test_close_to_transformers_as_it_is(name: str, dtype: torch.dtype, tolerance: float, fused: bool) -> None:
    """Without the help of `ReallyFloat64`: norms round to float32 (6e-8), and logits reach about 10 after three noisy
    layers that amplify. Tokens may part only where the reference itself was undecided."""
    model = noised(load_model(ModelSpec(name, config=ZOO[name]), dtype, torch.device("cpu")))
    llm = LLM(model, fused=fused, block_size=BLOCK_SIZE, num_blocks=ROOMY)
    tap = Tap(llm)
    outputs = llm.generate(prompts(), GREEDY)
    naive, num_equal = llm.naive_model(), 0
    for number, output in enumerate(outputs):
        wanted = reference(naive, list(output.prompt_token_ids))
        for step, (ours, theirs) in enumerate(zip(output.token_ids, wanted.token_ids, strict=True)):
            logits = tap.logits[f"{number}-0", len(output.prompt_token_ids) + step]
            assert float((logits - wanted.logits[step]).abs().max()) < tolerance
            if ours != theirs:
                best = wanted.logits[step].topk(2).values
                assert float(best[0] - best[1]) < 2 * tolerance
                break
            num_equal += 1
    assert num_equal > 0.8 * len(outputs) * GREEDY.max_tokens


def test_bfloat16_is_no_less_exact_than_transformers() -> None:
    """Both against float64 on the same (bfloat16) weights."""
    config = {**SHAPE, "model_type": "llama", "hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
    low = load_model(ModelSpec("low", config=config), torch.bfloat16, torch.device("cpu"))
    exact = load_model(ModelSpec("exact", config=config), torch.float64, torch.device("cpu"))
    exact.module.load_state_dict(low.module.state_dict())
    prompt = prompts((40,))[0]
    truth = _last_logits(exact, prompt)
    theirs = _last_logits(low, prompt)
    llm = LLM(low, num_blocks=8)
    assert llm.model.fused[128][0] is not None
    tap = Tap(llm)
    llm.generate([prompt], GREEDY)
    ours = tap.of(0, prompt, 1)[0].double()
    assert float((ours - truth).norm()) < 1.5 * float((theirs - truth).norm())


def _last_logits(model: LoadedModel, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.as_transformers()(torch.tensor([prompt])).logits[0, -1]
    return logits.double()
