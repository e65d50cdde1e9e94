"""Functions over a request's own logits: what transformers makes of the same ones, and what they cannot harm."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from llmkit import FinishReason, SamplingParams
from llmkit.errors import ConfigError
from llmkit.model.sampling import Sampler
from llmkit.model.sampling.plan import Planner
from llmkit.model.sampling.processors import Processors
from tests.equality.exact import ReallyFloat64
from tests.equality.runs import GREEDY, MAX_TOKENS, prompts
from tests.equality.zoo import VOCAB_SIZE, tiny_model
from tests.nightly.faults import EXCEPTIONS
from tests.testing.test_mutants import Bug, plant
from tests.tiny_llm import MakeLLM, check_nothing_left

Function = Callable[[Tensor, Tensor], Any]


def shifting(token_ids: Tensor, logits: Tensor) -> Tensor:
    """Depends on every token so far, and on their order."""
    weights = torch.arange(1, len(token_ids) + 1, device=token_ids.device)
    shift = int((token_ids * weights).sum()) % VOCAB_SIZE
    return logits + torch.roll(torch.linspace(0.0, 20.0, VOCAB_SIZE, dtype=logits.dtype), shift)


def never_twice(token_ids: Tensor, logits: Tensor) -> Tensor:
    return logits.index_fill(0, token_ids, -torch.inf)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_blocks", [48, 9])
def test_tokens_are_those_of_transformers(make_llm: MakeLLM, num_blocks: int, depth: int) -> None:
    model = tiny_model("llama")
    llm = make_llm(model, block_size=5, num_blocks=num_blocks, depth=depth, fused=False)
    params = GREEDY.model_copy(update={"logits_processors": (shifting, never_twice)})
    theirs: Any = LogitsProcessorList(
        [lambda ids, scores, one=one: one(ids[0], scores[0])[None] for one in params.logits_processors]
    )
    with ReallyFloat64():
        outputs = llm.generate(prompts(), [params, GREEDY, params, params, GREEDY])
        for output, ours in zip(outputs, (theirs, None, theirs, theirs, None), strict=True):
            ids = torch.tensor([output.prompt_token_ids])
            wanted = model.as_transformers().generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False,
                eos_token_id=None, pad_token_id=0, logits_processor=ours,
            )  # fmt: skip
            assert list(output.token_ids) == wanted[0, ids.shape[1] :].tolist()
            assert (len({*output.prompt_token_ids, *output.token_ids}) > MAX_TOKENS) or ours is None


def test_they_come_behind_masks_and_in_front_of_filters(make_llm: MakeLLM) -> None:
    seen: list[Tensor] = []

    def look(token_ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return torch.where(torch.arange(len(logits)) < 4, 0.0, -torch.inf)

    params = SamplingParams(n=3, max_tokens=9, seed=1, bad_token_ids=(2,), top_k=50, ignore_eos=True)
    (output,) = make_llm().generate([[5, 6]], params.model_copy(update={"logits_processors": (look,)}))
    assert all(bool(logits[2].isneginf()) and int(logits.isfinite().sum()) == len(logits) - 1 for logits in seen)
    assert {token for sample in output.completions for token in sample.token_ids} == {0, 1, 2, 3}
    assert len(seen) == 27


def raising(exception: type[BaseException]) -> Function:
    def fail(token_ids: Tensor, logits: Tensor) -> Tensor:
        raise exception("on purpose")

    return fail


def spoiling(token_ids: Tensor, logits: Tensor) -> Tensor:
    return logits.fill_(torch.nan)


FAULTS: dict[str, tuple[Function, str]] = {
    **{
        kind.__name__: (raising(kind), f"logits processor 'fail' failed: {kind.__name__}: on purpose")
        for kind in EXCEPTIONS
        if issubclass(kind, Exception)
    },
    "too short": (lambda token_ids, logits: logits[1:], "logits processor '<lambda>' failed: ValueError: it gave "),
    "a number": (lambda token_ids, logits: 3.0, "logits processor '<lambda>' failed: ValueError: it gave float"),
    "nothing": (lambda token_ids, logits: None, "logits processor '<lambda>' failed: ValueError: it gave NoneType"),
    "token ids": (lambda token_ids, logits: logits.long(), "logits processor '<lambda>' failed: ValueError: it gave "),
    "NaN": (spoiling, "no token can be chosen"),
    "no token": (lambda token_ids, logits: logits - torch.inf, "no token can be chosen"),
}


def witnesses() -> tuple[list[list[int]], list[SamplingParams]]:
    """31 of them, who ask for all sorts of things."""
    random, ways = Random(3), [{"temperature": 0.0}, {}, {"top_k": 9}, {"logprobs": 2}, {"repetition_penalty": 1.4}]
    asked = [[random.randrange(3, 97) for _ in range(random.randint(1, 20))] for _ in range(31)]
    params = [SamplingParams(max_tokens=8, ignore_eos=True, seed=at, **ways[at % 5]) for at in range(31)]  # type: ignore[arg-type]
    params[7] = params[7].model_copy(update={"logits_processors": (never_twice,)})
    return asked, params


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("way", [{"temperature": 0.0}, {"top_p": 0.9, "bad_token_ids": (5,)}], ids=["greedy", "drawn"])
def test_faults_stay_with_their_request(make_llm: MakeLLM, way: dict[str, Any], depth: int) -> None:
    """At its first token and later on, every fault beside 31 witnesses, whose tokens do not change."""
    llm = make_llm(num_blocks=60, depth=depth)
    asked, each = witnesses()
    wanted = [output.token_ids for output in llm.generate(asked, each)]
    for number, (fault, says) in enumerate(FAULTS.values()):
        num_good = number % 3
        late = lambda ids, logits, at=2 + num_good, fault=fault: fault(ids, logits) if len(ids) >= at else logits  # noqa: E731
        late.__name__ = fault.__name__
        params = SamplingParams(max_tokens=8, ignore_eos=True, logits_processors=(late,), **way)
        at = (5 * number) % 32
        outputs = llm.generate([*asked[:at], [8, 9], *asked[at:]], [*each[:at], params, *each[at:]])
        faulty = outputs.pop(at)
        assert faulty.finish_reason is FinishReason.ERROR and (faulty.error or "").startswith(says), faulty.error
        assert "\n" not in (faulty.error or "") and len(faulty.token_ids) == num_good
        assert [output.token_ids for output in outputs] == wanted
        check_nothing_left(llm)


def test_only_functions_are_taken_and_no_option_of_a_run() -> None:
    with pytest.raises(ConfigError, match=r"logits_processors\.0=3: Input should be callable"):
        SamplingParams(logits_processors=(3,))  # type: ignore[arg-type]
    params = SamplingParams(logits_processors=(never_twice,))
    assert "logits_processors" not in params.model_dump() and params != SamplingParams()
    with pytest.raises(ConfigError, match=r"a valid tuple \(allowed: list of functions, of Python only\)$"):
        SamplingParams(logits_processors=never_twice)  # type: ignore[arg-type]


BUGS: dict[str, Bug] = {
    "a function that fails takes its step along": (Processors.apply, "except Exception as", "except LookupError as"),
    "a function that fails is passed over": (Processors.apply, "mine.fill_(torch.nan)", "pass"),
    "reasons are those of other rows": (Processors.apply, "errors[row] =", "errors[local] ="),
    "what functions give is not looked at": (
        Processors.apply, "_checked(function(tokens[slot, : positions[local]], mine), vocab_size)",
        "torch.as_tensor(function(tokens[slot, : positions[local]], mine) or 0.0)"),
    "functions change each other's rows": (Processors.apply, "mine = logits[local,", "mine = logits[local - 1,"),
    "functions see another history": (Processors.apply, "tokens[slot, : pos", "tokens[local, : pos"),
    "functions see one token less": (Processors.apply, ": positions[local]]", ": positions[local] - 1]"),
    "greedy rows run no functions": (
        Planner._group, "if states[row].params.logits_processors",
        "if states[row].params.logits_processors and not states[row].is_greedy"),
    "functions come in front of masks": (
        Sampler._rows, "if group.edits is not None:",
        "if group.processors is not None:\n"
        "        group.processors.apply(edited, self._vocab_size, [positions[row] for row in group.rows], tokens)\n"
        "    if group.edits is not None:"),
}  # fmt: skip


@pytest.mark.mutant
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_of_functions_are_found(bug: str, make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, BUGS[bug])
    with pytest.raises(AssertionError):
        test_they_come_behind_masks_and_in_front_of_filters(make_llm)
        test_tokens_are_those_of_transformers(make_llm, 48, 0)
        test_faults_stay_with_their_request(make_llm, {"top_p": 0.9, "bad_token_ids": (5,)}, 1)
