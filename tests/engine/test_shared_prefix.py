"""Requests that share a prompt get the tokens that they get when each reads it for itself; keys in e4m3 besides."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from llmkit import LLM, RequestOutput, SamplingParams
from llmkit.engine.swapping import SwapCosts
from llmkit.model.loading import LoadedModel, load_model
from llmkit.model.spec import ModelSpec
from llmkit_attention.flash import limits
from llmkit_attention.flash.backend import FlashAttention

CONFIG = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024,
    "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
PREFIX = [2 + 31 * i % 500 for i in range(512)]
PROMPTS = [PREFIX + [2 + (7 * row + i) % 500 for i in range(1 + 9 * row % 80)] for row in range(21)]
PROMPTS += [[2 + (11 * row + 3 * i) % 500 for i in range(30 + 20 * row)] for row in range(3)]
PARAMS = [SamplingParams(max_tokens=12 + row % 7, temperature=0, ignore_eos=True, logprobs=2) for row in range(24)]
GAP = 0.25
"""Nats between the two likeliest tokens below which bfloat16 may choose either; its logits are multiples of 0.06."""


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(ModelSpec("small", config=CONFIG, seed=1), torch.bfloat16, torch.device("cuda"))


def generate(
    model: LoadedModel, pays_bytes: int, monkeypatch: pytest.MonkeyPatch, kv_dtype: str = "auto", **options: object
) -> tuple[list[RequestOutput], LLM]:
    """The prompts after the first of them, so that its blocks are cached."""
    monkeypatch.setattr(limits, "PAYS_BYTES", pays_bytes)
    llm = engine(model, kv_dtype, **options)
    llm.generate(PROMPTS[:1], PARAMS[:1])
    outputs = llm.generate(PROMPTS, PARAMS)
    assert llm.engine.planner.allocator.stats().num_used_blocks == 0
    return outputs, llm


def engine(model: LoadedModel, kv_dtype: str, **options: object) -> LLM:
    attention = {"name": "flash", "kv_dtype": kv_dtype}
    return LLM(model, {"name": "continuous", "max_num_seqs": 32}, attention=attention, dtype="bfloat16", **options)


def equal_but_for_near_ties(
    got: list[RequestOutput], wanted: list[RequestOutput], gap: float = GAP, least: float = 0.5
) -> None:
    """A share of at least `least` is equal; the others part where two tokens are nearly equally likely."""
    num_equal = 0
    for one, other in zip(got, wanted, strict=True):
        pairs = list(zip(one.token_ids, other.token_ids, strict=True))
        differs = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        num_equal += differs is None
        if differs is not None:
            assert other.logprobs is not None
            (_, first), (_, second) = other.logprobs[differs].top
            assert first - second <= gap, f"place {differs}: {pairs[differs]}, {first - second:.3f} nats apart"
    assert num_equal >= least * len(wanted), num_equal


@pytest.mark.cuda
@pytest.mark.parametrize("graphs", [True, False])
def test_a_shared_prompt_read_once_gives_the_same_tokens(
    model: LoadedModel, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, apart = generate(model, 1 << 60, monkeypatch, graphs=graphs)
    assert len({output.token_ids for output in wanted}) > 20
    got, together = generate(model, 1 << 10, monkeypatch, graphs=graphs)
    equal_but_for_near_ties(got, wanted)
    if graphs:
        kinds = [{shares for _, shares in llm.engine.executor.graphs._captured} for llm in (apart, together)]  # type: ignore[attr-defined]
        assert kinds == [{False}, {False, True}]
    else:
        steps = [llm.attention._step.shared for llm in (apart, together)]  # type: ignore[attr-defined]
        assert not steps[0] and steps[1], "three of the last step's rows share the prompt"


@pytest.mark.cuda
def test_replayed_and_eager_steps_share_alike(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = generate(model, 1 << 10, monkeypatch, graphs=False, depth=0)
    for depth in (0, 1):
        got, _ = generate(model, 1 << 10, monkeypatch, depth=depth)
        equal_but_for_near_ties(got, wanted)


@pytest.mark.cuda
def test_keys_in_e4m3_hold_twice_the_tokens(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, wide = generate(model, 1 << 60, monkeypatch, "fp8", graphs=False)
    got, narrow = generate(model, 1 << 10, monkeypatch, "fp8")
    equal_but_for_near_ties(got, wanted)
    _, plain = generate(model, 1 << 60, monkeypatch)
    assert 2 * narrow.attention.bytes_per_block() == plain.attention.bytes_per_block()
    assert wide.attention._pools[0].dtype is torch.float8_e4m3fn  # type: ignore[attr-defined]


@pytest.mark.cuda
def test_requests_in_e4m3_are_swapped(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool too small for all, and copies that cost nothing: whoever is preempted waits on the host."""
    prompts = [prompt[-40:] for prompt in PROMPTS]
    params = [given.model_copy(update={"max_tokens": 60 + row}) for row, given in enumerate(PARAMS)]
    wanted = engine(model, "fp8").generate(prompts, params)
    monkeypatch.setattr("llmkit.engine.assembly.measure_costs", lambda *given: SwapCosts(1.0, 0.0, 0.0))
    saved: dict[int, list[torch.Tensor]] = {}
    save, restore, num_restored = FlashAttention.save_blocks, FlashAttention.restore_blocks, 0

    def held(backend: FlashAttention, block: int) -> list[torch.Tensor]:
        return [pool[:, block].view(torch.uint8).clone() for pool in backend._pools]

    def save_and_note(backend: FlashAttention, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        saved.update((host, held(backend, block)) for block, host in zip(blocks, host_blocks, strict=True))
        save(backend, blocks, host_blocks)

    def restore_and_compare(backend: FlashAttention, host_blocks: Sequence[int], blocks: Sequence[int]) -> None:
        nonlocal num_restored
        restore(backend, host_blocks, blocks)
        for host, block in zip(host_blocks, blocks, strict=True):
            assert all(map(torch.equal, held(backend, block), saved[host]))
            num_restored += 1

    monkeypatch.setattr(FlashAttention, "save_blocks", save_and_note)
    monkeypatch.setattr(FlashAttention, "restore_blocks", restore_and_compare)
    small = engine(model, "fp8", cache={"name": "paged", "prefix": False}, block_size=16, num_blocks=64, swap_gib=0.05)
    got = small.generate(prompts, params)
    assert num_restored > 0
    # Sums that round otherwise may end up at the next number of e4m3, an eighth away, and outputs are five times as
    # long as the others here.
    equal_but_for_near_ties(got, wanted, gap=2 * GAP, least=0.25)
