"""`LLM.generate` and `chat`: the same tokens however they are computed, and logprobs that are the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmkit import LLM, FinishReason, RequestEvent, RequestOutput, SamplingParams, StepEvent, hookimpl
from tests.tiny_llm import EOS, MAX_MODEL_LEN, SCRIPT, VOCAB_SIZE, MakeLLM, tiny

PROMPTS = [
    torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (1, 3, 4, 5, 13, 30)
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
MIXED = [
    GREEDY,
    SamplingParams(max_tokens=12, seed=11, ignore_eos=True),
    SamplingParams(max_tokens=12, seed=12, ignore_eos=True, temperature=1.5, top_k=20, top_p=0.9, min_p=0.01),
    SamplingParams(max_tokens=12, seed=13, ignore_eos=True, n=3, repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(max_tokens=12, seed=14, ignore_eos=True, logit_bias={5: 4.0}, bad_token_ids=(7,)),
    SamplingParams(max_tokens=12, seed=15, min_tokens=6, stop_token_ids=tuple(range(3, 60))),
]
SCARCE = {"num_blocks": 14}
WAYS: dict[str, dict[str, Any]] = {
    "depth 1": {"depth": 1},
    "chunks of 1": {"scheduler": {"name": "continuous", "max_chunk_tokens": 1}},
    "chunks of 3, depth 1": {"scheduler": {"name": "continuous", "max_chunk_tokens": 3}, "depth": 1},
    "7 tokens a step": {"scheduler": {"name": "continuous", "max_num_batched_tokens": 7}},
    "preempted": SCARCE,
    "preempted, depth 1": {**SCARCE, "depth": 1},
    "two at a time": {"scheduler": {"name": "continuous", "max_num_seqs": 2}},
    "one at a time": {"scheduler": "sequential", "depth": 1},
    "static": {"scheduler": {"name": "static", "max_num_seqs": 3}},
    "priority": {"scheduler": "priority", **SCARCE},
    "contiguous": {"cache": "contiguous", "depth": 1},
    "transformers' own layers": {"fused": False},
}


def tokens(outputs: list[RequestOutput]) -> list[list[tuple[int, ...]]]:
    assert all(completion.error is None for output in outputs for completion in output.completions)
    return [[completion.token_ids for completion in output.completions] for output in outputs]


def num_preemptions(outputs: list[RequestOutput]) -> int:
    return sum(completion.metrics.num_preemptions for output in outputs for completion in output.completions)


def test_greedy_is_what_transformers_generates(make_llm: MakeLLM) -> None:
    llm = make_llm()
    model = llm.naive_model()
    model.generation_config.eos_token_id = None
    outputs = llm.generate(PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        expected = model.generate(ids, **options)[0, len(prompt) :].tolist()
        assert list(output.token_ids) == expected
        assert output.prompt_token_ids == tuple(prompt) and output.prompt is None and output.text == ""
        assert output.finish_reason is FinishReason.LENGTH
    assert len({token for output in outputs for token in output.token_ids}) > 30


@pytest.fixture(scope="module")
def alone() -> list[list[tuple[int, ...]]]:
    """Each request by itself, from the last to the first."""
    llm = LLM(tiny(), dtype="float64", block_size=4)
    outputs = [llm.generate(PROMPTS[i], MIXED[i])[0] for i in reversed(range(len(PROMPTS)))][::-1]
    distinct = {token for each in tokens(outputs) for completion in each for token in completion}
    assert len(distinct) > 40 and len(set(tokens(outputs)[3])) == 3
    return tokens(outputs)


def test_a_batch_gives_the_tokens_of_each_alone(make_llm: MakeLLM, alone: list[Any]) -> None:
    assert tokens(make_llm().generate(PROMPTS, MIXED)) == alone


@pytest.mark.parametrize("way", WAYS)
def test_the_way_of_computing_changes_no_token(make_llm: MakeLLM, way: str, alone: list[Any]) -> None:
    outputs = make_llm(**WAYS[way]).generate(PROMPTS[::-1], MIXED[::-1])[::-1]
    assert tokens(outputs) == alone
    assert (num_preemptions(outputs) > 0) == ("num_blocks" in WAYS[way])


def test_seeds_decide_and_nothing_else(make_llm: MakeLLM) -> None:
    llm, prompt = make_llm(), PROMPTS[2]
    seeded = [SamplingParams(seed=seed, max_tokens=10, ignore_eos=True) for seed in (1, 2, 1)]
    one, two, again = tokens(llm.generate([prompt] * 3, seeded))
    assert one == again != two
    assert tokens(llm.generate(prompt, seeded[0])) == [one]
    unseeded = SamplingParams(max_tokens=10, ignore_eos=True)
    first, second = tokens(llm.generate([prompt] * 2, unseeded))
    assert first != second
    fresh = tokens(make_llm().generate([prompt] * 2, unseeded))
    assert fresh == tokens(make_llm().generate([prompt] * 2, unseeded))
    assert fresh != tokens(make_llm(seed=1).generate([prompt] * 2, unseeded))


def test_samples_are_distinct_and_the_first_is_that_of_n_1(make_llm: MakeLLM) -> None:
    llm = make_llm()
    params = SamplingParams(n=4, seed=5, max_tokens=10, ignore_eos=True)
    (output,) = llm.generate(PROMPTS[1], params)
    assert [completion.index for completion in output.completions] == [0, 1, 2, 3]
    assert len({completion.token_ids for completion in output.completions}) == 4
    (single,) = llm.generate(PROMPTS[1], params.model_copy(update={"n": 1}))
    assert single.token_ids == output.token_ids == output.completions[0].token_ids


def test_samples_are_in_order_whichever_ends_first(make_llm: MakeLLM) -> None:
    params = SamplingParams(n=8, seed=2, max_tokens=30, stop_token_ids=tuple(range(3, 20)))
    (output,) = make_llm().generate(PROMPTS[1], params)
    lengths = [len(completion.token_ids) for completion in output.completions]
    assert [completion.index for completion in output.completions] == list(range(8)) and lengths != sorted(lengths)


def test_one_prompt_many_prompts_no_prompt(make_llm: MakeLLM) -> None:
    llm = make_llm()
    single = llm.generate(PROMPTS[0], GREEDY)
    assert len(single) == 1 and llm.generate([], GREEDY) == []
    many = llm.generate([tuple(prompt) for prompt in PROMPTS], GREEDY)
    assert [output.prompt_token_ids for output in many] == [tuple(prompt) for prompt in PROMPTS]
    assert many[0].token_ids == single[0].token_ids


def log_softmax(prompt: list[int], output: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        logits = tiny().as_transformers()(torch.tensor([[*prompt, *output]]), use_cache=False).logits[0]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize(
    "options", [{}, {"scheduler": {"name": "continuous", "max_chunk_tokens": 3}, "depth": 1}, SCARCE]
)
def test_logprobs_are_those_of_the_model(make_llm: MakeLLM, options: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=8, seed=1, ignore_eos=True, temperature=2.0, logprobs=3, prompt_logprobs=2)
    prompts = [prompt for prompt in PROMPTS[::-1] for _ in "ab"]
    all_outputs = make_llm(**options).generate(prompts, [GREEDY, params] * len(PROMPTS))
    assert (num_preemptions(all_outputs) > 0) == (options is SCARCE)
    assert all(output.logprobs is None and output.prompt_logprobs is None for output in all_outputs[::2])
    for prompt, output in zip(prompts[1::2], all_outputs[1::2], strict=True):
        assert output.logprobs is not None and output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(prompt) - 1 and len(output.logprobs) == 8
        expected = log_softmax(prompt, output.token_ids)
        sequence = [*prompt, *output.token_ids]
        for position, entry in enumerate([*output.prompt_logprobs, *output.logprobs]):
            row, token = expected[position], sequence[position + 1]
            assert entry.token_id == token and entry.logprob == pytest.approx(float(row[token]), abs=1e-5)
            assert entry.rank == int((row > row[token]).sum()) + 1
            best = row.topk(2 if position < len(prompt) - 1 else 3)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_are_none_unless_asked_for(make_llm: MakeLLM) -> None:
    asked = GREEDY.model_copy(update={"logprobs": 0, "prompt_logprobs": 0})
    plain, zero = make_llm().generate([PROMPTS[3]] * 2, [GREEDY, asked])
    assert plain.logprobs is None and plain.prompt_logprobs is None
    assert zero.logprobs is not None and all(entry.top == () for entry in zero.logprobs)
    assert zero.prompt_logprobs is not None and [e.token_id for e in zero.prompt_logprobs] == PROMPTS[3][1:]


def test_where_it_ends(make_llm: MakeLLM) -> None:
    llm, prompt = make_llm(), PROMPTS[4]
    (free,) = llm.generate(prompt, GREEDY)
    stop = next(token for i, token in enumerate(free.token_ids) if i >= 3 and token not in free.token_ids[:i])
    at = free.token_ids.index(stop) + 1
    ends = {
        "stop id": ({"stop_token_ids": (stop,)}, at, FinishReason.STOP),
        "length": ({"max_tokens": 2}, 2, FinishReason.LENGTH),
        "both": ({"stop_token_ids": (stop,), "max_tokens": at}, at, FinishReason.STOP),
    }
    for update, length, reason in ends.values():
        (output,) = llm.generate(prompt, GREEDY.model_copy(update=update))
        assert (output.token_ids, output.finish_reason) == (free.token_ids[:length], reason)
    barred = GREEDY.model_copy(update={"stop_token_ids": (stop,), "min_tokens": at + 1})
    (output,) = llm.generate(prompt, barred)
    assert output.token_ids[: at - 1] == free.token_ids[: at - 1] and stop not in output.token_ids[:at]
    (output,) = llm.generate(prompt, GREEDY.model_copy(update={"max_tokens": 1000}))
    assert len(prompt) + len(output.token_ids) == MAX_MODEL_LEN and output.finish_reason is FinishReason.LENGTH


def test_the_end_token_ends_unless_ignored(make_llm: MakeLLM) -> None:
    wanted = {"temperature": 0.0, "max_tokens": 4, "allowed_token_ids": (EOS,)}
    ends, goes_on, late = make_llm().generate(
        [PROMPTS[0]] * 3,
        [
            SamplingParams(**wanted),
            SamplingParams(**wanted, ignore_eos=True),
            SamplingParams(temperature=0.0, max_tokens=4, min_tokens=3, logit_bias={EOS: 100.0}),
        ],
    )
    assert (ends.token_ids, ends.finish_reason) == ((EOS,), FinishReason.STOP)
    assert (goes_on.token_ids, goes_on.finish_reason) == ((EOS,) * 4, FinishReason.LENGTH)
    assert EOS not in late.token_ids[:3] and late.token_ids[3] == EOS and late.finish_reason is FinishReason.STOP


def test_text_ids_and_chat(make_llm: MakeLLM, speaker: dict[str, str]) -> None:
    llm = make_llm(speaker)
    text, ids = llm.generate(["a", llm.encode("a")], SamplingParams(temperature=0.0, max_tokens=40))
    rest = "".join(SCRIPT.partition("1")[2]).removesuffix("<end>")
    spoken, cut = llm.generate(["1", "x"], SamplingParams(temperature=0.0, max_tokens=40))
    assert (spoken.text, spoken.prompt, spoken.finish_reason) == (rest, "1", FinishReason.STOP)
    assert text.token_ids == ids.token_ids and (text.prompt, ids.prompt) == ("a", None)
    assert text.text == ids.text and cut.token_ids != spoken.token_ids
    talks = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}, {"role": "x", "content": "."}]]
    chat = llm.chat(talks, GREEDY)
    assert [out.prompt_token_ids for out in chat] == [tuple(llm.encode(s)) for s in ("u>a;a>", "u>b;x>.;a>")]
    assert tokens(chat) == tokens(llm.generate(["u>a;a>", "u>b;x>.;a>"], GREEDY))
    assert llm.chat(talks[0], GREEDY)[0].token_ids == chat[0].token_ids


class Observer:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepEvent] = []
        self.requests: list[RequestEvent] = []

    @hookimpl
    def llmkit_step_finished(self, event: StepEvent) -> None:
        self.steps.append(event)

    @hookimpl
    def llmkit_request_finished(self, event: RequestEvent) -> None:
        self.requests.append(event)


@pytest.mark.parametrize("depth", [0, 1])
def test_plugin_objects_observe(make_llm: MakeLLM, depth: int) -> None:
    observer, deaf = Observer(), Observer()
    llm = make_llm(plugins=[observer], depth=depth)
    make_llm(plugins=[deaf])
    outputs = llm.generate(PROMPTS, MIXED)
    completions = [completion for output in outputs for completion in output.completions]
    assert sum(sum(step.new_tokens.values()) for step in observer.steps) == sum(len(c.token_ids) for c in completions)
    assert [step.plan.step_id for step in observer.steps] == list(range(len(observer.steps)))
    told = sorted((event.num_output_tokens, event.finish_reason) for event in observer.requests)
    assert told == sorted((len(c.token_ids), c.finish_reason) for c in completions)
    assert deaf.steps == [] and deaf.requests == []


def test_two_over_one_model_at_the_same_time(make_llm: MakeLLM, alone: list[Any]) -> None:
    one, two = make_llm(depth=1), make_llm(scheduler="priority", cache="contiguous", fused=False)
    assert one.model is two.model
    pairs = [(llm, llm.stream(PROMPTS, MIXED)) for llm in (one, two)]
    got: list[dict[tuple[int, int], list[int]]] = [{}, {}]
    while pairs:
        for number, (_, stream) in enumerate(pairs):
            if (piece := next(stream, None)) is None:
                pairs.pop(number)
                got.append(got.pop(number))
                break
            got[number].setdefault((piece.prompt_index, piece.index), []).extend(piece.token_ids)
    expected = {(p, i): list(c) for p, each in enumerate(alone) for i, c in enumerate(each)}
    assert got == [expected, expected]
