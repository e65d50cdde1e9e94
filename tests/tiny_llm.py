"""Tiny models behind the tests of `LLM`: one of token ids only, and one with a tokenizer that says what it is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmkit import LLM
from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.spec import ModelSpec

MakeLLM = Callable[..., LLM]
VOCAB_SIZE, EOS, BLOCK_SIZE, MAX_MODEL_LEN = 97, 2, 4, 128
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_MODEL_LEN,
    "bos_token_id": None,
    "pad_token_id": None,
}
IDS = ModelSpec("tiny", config={**SHAPE, "model_type": "llama", "vocab_size": VOCAB_SIZE, "eos_token_id": EOS}, seed=1)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}>{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a>{% endif %}"
)
END = "<end>"
SCRIPT = "abé €1\U0001f600xyz._stOP\n" + END
"""What the speaking model says, round and round; no byte comes twice, so the last byte alone decides the next."""


@cache
def tiny() -> LoadedModel:
    """float64 llama over ids, noised so that a lost KV entry changes tokens."""
    model = load_model(IDS, torch.float64, torch.device("cpu"))
    noise(model.module)
    return model


def noise(module: torch.nn.Module) -> None:
    """N(0, 0.4) on every matrix, always the same."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.4, generator=generator)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, three merges and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("x", "y"), ("O", "P")]
    vocab = {piece: number for number, piece in enumerate([*alphabet, *(left + right for left, right in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, chat_template=CHAT_TEMPLATE)


def save_speaking_model(folder: Path) -> None:
    """A checkpoint whose greedy continuation of any part of `SCRIPT` is the rest: embedding and head form a ring."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    ring = tokenizer.encode(SCRIPT)
    assert len(set(ring)) == len(ring)
    config = LlamaConfig(**SHAPE | {"hidden_size": 64}, vocab_size=len(tokenizer), eos_token_id=ring[-1])
    model = LlamaForCausalLM(config).double()
    noise(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = model.model.embed_tokens.weight
        rows = [*ring, *(set(range(len(tokenizer))) - set(ring))]
        model.lm_head.weight[rows[1:] + rows[:1]] = embeddings[rows]
    model.save_pretrained(folder)


def check_nothing_left(llm: LLM) -> None:
    """Every block and slot is back, and nobody is waited for."""
    engine, residency = llm.engine, llm.engine.planner._residency
    engine.planner.allocator.check()
    assert engine.planner.allocator.stats().num_used_blocks == 0 and not engine.planner.allocator.census()
    assert residency.num_free_slots == engine.planner.scheduler.settings.max_num_seqs
    assert residency.num_reclaiming_blocks == 0
    assert not engine.planner.requests and not engine.has_unfinished
    assert (engine.planner.num_running, engine.planner.num_waiting) == (0, 0)
