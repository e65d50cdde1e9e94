"""Models with the head dimensions and ratios of real ones, small elsewhere, and by what a bfloat16 run may differ.

The measure is transformers itself: the same weights in float32 say what is right, and how far its bfloat16 run is from
that says how far bfloat16 may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from llmkit import SamplingParams
from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.spec import ModelSpec

VOCAB_SIZE, WINDOW, NUM_LAYERS = 1024, 48, 3
PROMPT_LENS = (1, WINDOW - 1, WINDOW + 1, 64, 150)
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    # Logits of attention spread by about 2: keys matter, and rounding does not grow from layer to layer.
    "initializer_range": 0.06,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {**COMMON, "model_type": "qwen3", "num_attention_heads": 16},
    "llama": {**COMMON, "model_type": "llama"},
    "mistral": {**COMMON, "model_type": "mistral", "sliding_window": WINDOW},
    "gemma2": {
        **COMMON,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 30.0,
    },
    "phi3": {
        **COMMON,
        "model_type": "phi3",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
    "qwen2": {
        **COMMON,
        "model_type": "qwen2",
        "num_attention_heads": 16,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "mixtral": {**COMMON, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **COMMON,
        "model_type": "qwen3_moe",
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 192,
        "norm_topk_prob": True,
    },
}


@dataclass(frozen=True, slots=True)
class Truth:
    """`logits` [N, V] float32 of the last N tokens' successors, and transformers' own distance from them in bfloat16:
    `error` [N], the largest of each position."""

    logits: torch.Tensor
    error: torch.Tensor

    def gap(self, position: int, token_id: int) -> float:
        """By how much another token is better than `token_id` at a position; 0 if none is."""
        logits = self.logits[position]
        return float(logits.max() - logits[token_id])


@cache
def loaded(name: str, device: str) -> LoadedModel:
    """A model of SHAPES in bfloat16."""
    return load_model(ModelSpec(name, config=SHAPES[name], seed=5), torch.bfloat16, torch.device(device))


@cache
def references(name: str, device: str) -> tuple[Any, Any]:
    """transformers' model over the same weights in bfloat16, and a copy in float32."""
    half = loaded(name, device).as_transformers()
    return half, deepcopy(half).float()


@torch.inference_mode()
def truth(name: str, device: str, prompt: Sequence[int], output: Sequence[int]) -> Truth:
    """What transformers says about every token of `output` behind `prompt`, each given all tokens before it."""
    ids = torch.tensor([[*prompt, *output]], device=device)[:, :-1]
    half, full = (
        model(input_ids=ids, use_cache=False).logits[0, -len(output) :].float().cpu()
        for model in references(name, device)
    )
    return Truth(full, (half - full).abs().amax(-1))


def prompts(number: int = len(PROMPT_LENS)) -> list[list[int]]:
    """Random token ids of PROMPT_LENS, round and round."""
    generator = torch.Generator().manual_seed(2)
    lengths = [PROMPT_LENS[index % len(PROMPT_LENS)] for index in range(number)]
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def unexplained(name: str, device: str, prompt: list[int], one: Sequence[int], other: Sequence[int]) -> str:
    """Why two greedy outputs differ more than rounding explains; empty if equal, or nearly tied where they part.

    Rounding may swap tokens whose float32 logits are closer than twice the error of a run, and a run may err by twice
    what transformers does in bfloat16.
    """
    parted = next((index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
    if parted is None:
        return ""
    said = truth(name, device, prompt, one[: parted + 1])
    gap, allowed = max(said.gap(parted, tokens[parted]) for tokens in (one, other)), 4 * float(said.error.max())
    return "" if gap <= allowed else f"token {parted}: {one[parted]} or {other[parted]}, {gap:.3f} apart, {allowed:.3f}"
