"""The two sides of an equality test: `transformers.generate`, one prompt at a time, and the engine with all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import torch

from llmkit import (
    Registry,
    RequestOutput,
    RequestQueue,
    SamplingParams,
    Scheduler,
    SchedulingStep,
    StepPlan,
    hookimpl,
    load_plugins,
)
from llmkit.engine.backends import requirements_of
from llmkit.llm import LLM
from llmkit.model.certify import certified_decoder
from llmkit.model.fused import FusedDecoder
from llmkit.model.loading import LoadedModel
from tests.equality.exact import ReallyFloat64
from tests.equality.zoo import VOCAB_SIZE, WINDOW, tiny_model

BLOCK_SIZE, MAX_TOKENS, ROOMY, SCARCE = 5, 12, 48, 9
PROMPT_LENS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 4 * BLOCK_SIZE + 3)
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)


def prompts(lengths: Sequence[int] = PROMPT_LENS) -> list[list[int]]:
    """Random token ids, the same on every run."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@dataclass(frozen=True)
class Reference:
    """What `transformers.generate` says about one prompt: tokens, and the logits [MAX_TOKENS, V] they come from."""

    token_ids: list[int]
    logits: torch.Tensor


@cache
def references(name: str, device: str = "cpu") -> list[Reference]:
    """`transformers.generate` on the weights of `tiny_model(name)`, with its own cache, one prompt after the other."""
    model = tiny_model(name, device).as_transformers()
    with ReallyFloat64():
        return [reference(model, prompt) for prompt in prompts()]


def reference(model: Any, prompt: list[int], max_tokens: int = MAX_TOKENS) -> Reference:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Reference(out.sequences[0, len(prompt) :].tolist(), torch.stack([logits[0] for logits in out.logits]))


@dataclass
class Tap:
    """Stands between executor and network, and keeps plans and the logits that tokens were sampled from.

    `error`: by how much they differ from the reference, if that was looked at.
    """

    llm: LLM
    error: float = 0.0
    plans: list[StepPlan] = field(default_factory=list)
    logits: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        executor: Any = self.llm.engine.executor
        network, launch = executor.network, executor.launch

        def tapped_launch(plan: StepPlan) -> Any:
            self.plans.append(plan)
            return launch(plan)

        def tapped_network(*inputs: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = network(*inputs)
            rows = [row for row in self.plans[-1].scheduled if row.samples]
            for row, row_logits in zip(rows, logits, strict=False):
                self.logits[row.request_id, row.start + row.num_tokens] = row_logits.clone()
            return logits

        executor.launch, executor.network = tapped_launch, tapped_network

    def of(self, number: int, prompt: list[int], num_tokens: int = MAX_TOKENS) -> torch.Tensor:
        """Logits [num_tokens, V] of the first sample of the `number`-th prompt."""
        return torch.stack([self.logits[f"{number}-0", len(prompt) + i] for i in range(num_tokens)])


def exact_decoder(model: LoadedModel, max_model_len: int) -> tuple[FusedDecoder | None, str]:
    """As `certified_decoder`, without float32 detours."""
    decoder, reason = certified_decoder(model, max_model_len)
    if decoder is not None:
        with torch.inference_mode(), ReallyFloat64():
            decoder = FusedDecoder(model, max_model_len)
    return decoder, reason


def fused_exactly() -> AbstractContextManager[object]:
    """Inside, networks are fused without float32 detours."""
    return patch("llmkit.model.network.certified_decoder", exact_decoder)


def interrupted(base: type[Scheduler]) -> type[Scheduler]:
    """A scheduler that also preempts somebody every few steps, whatever the cache, for a while."""

    class Interrupted(base):  # type: ignore[misc, valid-type]
        num_steps = 0

        def schedule(self, queue: RequestQueue, step: SchedulingStep) -> None:
            super().schedule(queue, step)
            self.num_steps += 1
            if self.num_steps % 6 == 0 and self.num_steps <= 36 and queue.running:
                step.preempt(queue.running[self.num_steps // 6 % len(queue.running)])

        def repeats(self, num_waiting: int, num_free_seqs: int) -> bool:
            """It has to be asked, or it could not interrupt."""
            return False

    return Interrupted


class Interruptions:
    """Adds an interrupted sibling of every installed scheduler."""

    @hookimpl(trylast=True)
    def llmkit_register(self, registry: Registry) -> None:
        for name in registry.names("scheduler"):
            registry.add_scheduler(f"{name}_interrupted", interrupted(registry.get("scheduler", name).load()))


@cache
def installed() -> Registry:
    return load_plugins()[0]


def backends() -> Iterator[str]:
    """Attention backends that can serve the zoo here."""
    requirements = requirements_of(tiny_model("llama"), BLOCK_SIZE)
    for name in installed().names("attention"):
        if not installed().get("attention", name).load().check(requirements):
            yield name


def scheduler_options(name: str, chunk: int = 0, budget: int = 2048) -> dict[str, Any]:
    """Options of an installed scheduler, those it has of what is asked; `chunk=0` means no limit."""
    fields = installed().get("scheduler", name.removesuffix("_interrupted")).settings.model_fields
    max_num_seqs = min(8, fields["max_num_seqs"].default or 8)
    asked = {"max_num_batched_tokens": budget, "max_num_seqs": max_num_seqs, "max_chunk_tokens": chunk}
    return {"name": name, **{option: value for option, value in asked.items() if option in fields}}


def error_of(tap: Tap, outputs: list[RequestOutput], wanted: list[Reference]) -> float:
    """Largest difference of any logit; the tokens must be equal."""
    for output, ref in zip(outputs, wanted, strict=True):
        assert output.error is None
        assert list(output.token_ids) == ref.token_ids
    cases = enumerate(zip(outputs, wanted, strict=True))
    return max(
        float((tap.of(i, list(o.prompt_token_ids), len(r.token_ids)) - r.logits).abs().max()) for i, (o, r) in cases
    )
