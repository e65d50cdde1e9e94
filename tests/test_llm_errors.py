"""Bad input gets one clear line and loses nothing: neighbours keep their tokens, the engine its blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmkit import (
    LLM,
    CapacityError,
    ConfigError,
    EngineSettings,
    FinishReason,
    ModelError,
    RequestError,
    RequestEvent,
    SamplingParams,
    hookimpl,
)
from llmkit.engine.memory import choose_num_blocks
from llmkit.model.loading import load_model
from tests.tiny_llm import IDS, MAX_MODEL_LEN, VOCAB_SIZE, MakeLLM, check_nothing_left, noise, tiny

GOOD = [[5, 6, 7], list(range(10, 30)), [50]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=10, ignore_eos=True, seed=3)

BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "empty": ([], "the prompt is empty"),
    "beyond": ([3, VOCAB_SIZE], f"token id {VOCAB_SIZE} in prompt is outside the vocabulary [0, {VOCAB_SIZE})"),
    "huge": ([1 << 70], f"token id {1 << 70} in prompt is outside the vocabulary"),
    "negative": ([3, -1], "token id -1 in prompt is outside the vocabulary"),
    "long": ([3] * MAX_MODEL_LEN, f"the prompt has {MAX_MODEL_LEN} tokens, but the model holds {MAX_MODEL_LEN}"),
    "floats": ([3.0, 4.0], "a prompt is a string or a list of token ids, not list of float"),
    "bools": ([True, False], "a prompt is a string or a list of token ids, not list of bool"),
    "nested": ([[3]], "a prompt is a string or a list of token ids, not list of list"),
    "a number": (7, "a prompt is a string or a list of token ids, not int"),
    "none": (None, "a prompt is a string or a list of token ids, not NoneType"),
    "bytes": (b"abc", "a prompt is a string or a list of token ids, not bytes"),
    "a dict": ({3: 4}, "a prompt is a string or a list of token ids, not dict"),
    "text without tokenizer": ("abc", "model 'tiny' has no tokenizer; give prompts as token ids"),
}
BAD_PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"logit_bias": {VOCAB_SIZE: 1.0}}, f"token id {VOCAB_SIZE} in logit_bias is outside the vocabulary"),
    "allowed": ({"allowed_token_ids": (-1,)}, "token id -1 in allowed_token_ids is outside"),
    "bad": ({"bad_token_ids": (1000,)}, "token id 1000 in bad_token_ids is outside"),
    "stop ids": ({"stop_token_ids": (1000,)}, "token id 1000 in stop_token_ids is outside"),
    "stop": ({"stop": ("x",)}, "model 'tiny' has no tokenizer; stop strings need one"),
}


def one_line(error: BaseException | str | None) -> str:
    message = str(error)
    assert error is not None and message.strip() and "\n" not in message and len(message) < 400
    return message


@pytest.fixture(scope="module")
def expected() -> list[list[tuple[int, ...]]]:
    llm = LLM(tiny(), dtype="float64", block_size=4)
    return [[llm.generate([prompt], params)[0].token_ids for prompt in GOOD] for params in (GREEDY, SAMPLED)]


def check_among_good(llm: LLM, bad: Any, params: SamplingParams, says: str, expected: list[Any]) -> None:
    for way, good_params in enumerate((GREEDY, SAMPLED)):
        prompts: list[Any] = [GOOD[0], bad, GOOD[1], GOOD[2]]
        each = [good_params, params, good_params, good_params]
        first, failed, second, third = llm.generate(prompts, each)
        assert [output.token_ids for output in (first, second, third)] == expected[way]
        assert failed.finish_reason is FinishReason.ERROR and failed.token_ids == () and failed.text == ""
        assert one_line(failed.error).startswith(says)
        assert [c.error for c in failed.completions] == [failed.error] * params.n
        pieces = [piece for piece in llm.stream(prompts, each) if piece.prompt_index == 1]
        assert [(piece.finish_reason, piece.error) for piece in pieces] == [("error", failed.error)] * params.n


@pytest.mark.parametrize("bad", BAD_PROMPTS)
def test_a_bad_prompt_among_good_ones(make_llm: MakeLLM, bad: str, expected: list[Any]) -> None:
    prompt, says = BAD_PROMPTS[bad]
    check_among_good(make_llm(depth=1), prompt, SamplingParams(n=2), says, expected)


@pytest.mark.parametrize("bad", BAD_PARAMS)
def test_bad_parameters_among_good_ones(make_llm: MakeLLM, bad: str, expected: list[Any]) -> None:
    update, says = BAD_PARAMS[bad]
    check_among_good(make_llm(), [3, 4], SamplingParams(n=3, **update), says, expected)


@pytest.mark.parametrize("cache", ["paged", "contiguous"])
def test_longer_than_the_cache(make_llm: MakeLLM, cache: str, expected: list[Any]) -> None:
    llm = make_llm(cache=cache, num_blocks=8)
    says = "the prompt has 32 tokens, but the cache holds 32 with at least one to generate"
    check_among_good(llm, [3] * 32, GREEDY, says, expected)
    (output,) = llm.generate([[3] * 31], GREEDY)
    assert len(output.token_ids) == 1 and output.finish_reason is FinishReason.LENGTH


def test_text_that_is_no_text(make_llm: MakeLLM, speaker: dict[str, str]) -> None:
    llm = make_llm(speaker)
    good = llm.generate("ab", GREEDY)[0].token_ids
    outputs = llm.generate(["ab", "\ud800", "", "ab"], GREEDY)
    assert outputs[0].token_ids == outputs[3].token_ids == good
    assert one_line(outputs[1].error).startswith("the prompt cannot be encoded: ")
    assert outputs[2].error == "the prompt is empty"


def test_too_long_a_text_is_refused_without_a_warning(
    make_llm: MakeLLM, speaker: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm(speaker)
    llm._tokenizer().model_max_length = 8
    of_transformers = logging.getLogger("transformers")
    of_transformers.addHandler(caplog.handler)  # it does not propagate
    try:
        (output,) = llm.generate("ab" * 5000, GREEDY)
    finally:
        of_transformers.removeHandler(caplog.handler)
    assert one_line(output.error).startswith("the prompt has ") and not caplog.records


def test_a_conversation_that_is_none(make_llm: MakeLLM, speaker: dict[str, str]) -> None:
    llm = make_llm(speaker)
    talk = [{"role": "user", "content": "ab"}]
    good = llm.chat(talk, GREEDY)[0].token_ids
    outputs: Any = llm.chat([talk, [{"content": "ab"}], [7], talk], GREEDY)  # type: ignore[list-item]
    assert outputs[0].token_ids == outputs[3].token_ids == good
    for output in outputs[1:3]:
        assert one_line(output.error).startswith("the chat template refuses this conversation: ")
    with pytest.raises(ModelError, match="model 'tiny' has no tokenizer"):
        make_llm().chat(talk)


@pytest.mark.parametrize(
    ("prompts", "params", "says"),
    [
        (GOOD, [GREEDY, SAMPLED], "3 prompts but 2 sampling parameters"),
        (GOOD, {"max_tokens": 3}, "sampling parameters are a SamplingParams or a list of them, not dict"),
        (GOOD, [GREEDY, 3, GREEDY], "sampling parameters are a SamplingParams or a list of them, not int"),
        (None, GREEDY, "prompts are a string, a list of token ids or a list of those, not NoneType"),
        (7, GREEDY, "prompts are a string, a list of token ids or a list of those, not int"),
    ],
)
def test_a_call_that_makes_no_sense_queues_nothing(make_llm: MakeLLM, prompts: Any, params: Any, says: str) -> None:
    llm = make_llm()
    for call in (llm.generate, llm.stream):
        with pytest.raises(RequestError) as error:
            list(call(prompts, params))
        assert one_line(error.value).startswith(says)
        check_nothing_left(llm)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_request_without_a_distribution_fails_by_itself(
    make_llm: MakeLLM, poison: float, expected: list[Any]
) -> None:
    """Logits that are no numbers end the request in one line; the engine goes on and keeps nothing."""
    model = load_model(IDS, torch.float64, torch.device("cpu"))
    noise(model.module)
    embedding: Any = model.module.get_input_embeddings()
    embedding.weight[9] = poison
    llm = make_llm(model)
    for output in llm.generate([[9] * 20, [4, 9]], SAMPLED.model_copy(update={"n": 2})):
        assert [c.finish_reason for c in output.completions] == [FinishReason.ERROR] * 2
        assert all(one_line(c.error) and c.token_ids == () for c in output.completions)
    in_parts = make_llm(model, cache="contiguous", scheduler={"name": "continuous", "max_chunk_tokens": 3})
    good, bad = in_parts.generate([GOOD[1], [4, 9]], SAMPLED)
    assert good.token_ids == expected[1][1] and bad.finish_reason is FinishReason.ERROR


def never(*_: object, **__: object) -> None:
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scheduler": "continous"}, "unknown scheduler 'continous'; did you mean 'continuous'? (choices: "),
        ({"cache": "pagd"}, "unknown cache 'pagd'; did you mean 'paged'? (choices: "),
        ({"attention": "spda"}, "unknown attention 'spda'; did you mean 'sdpa'? (choices: "),
        ({"model": "embeded"}, "unknown model 'embeded'; did you mean 'embedded'? (choices: "),
        ({"model": "hf"}, "model.path: a value is required"),
        ({"scheduler": {"name": "continuous", "max_seqs": 3}}, "scheduler.max_seqs: no such option; did you mean"),
        ({"scheduler": {"name": "continuous", "max_num_seqs": 0}}, "scheduler.max_num_seqs=0: Input should be"),
        ({"scheduler": {"max_num_seqs": 3}}, "scheduler: give a name (choices: "),
        ({"scheduler": None}, "scheduler: give a name (choices: "),
        ({"cache": 7}, "cache: give a name (choices: "),
        ({"model": 7}, "model: give a name (choices: "),
        ({"attention": {"name": "auto", "x": 1}}, "attention.x: no such option"),
        ({"schedulr": "static"}, "schedulr: no such keyword; did you mean 'scheduler'?"),
        (
            {"model": "gpt2"},
            "unknown model 'gpt2' (choices: embedded, gemma2_2b, hf, llama_1b, llama_8b, qwen3_0_6b, qwen3_30b_a3b, "
            "qwen3_4b); a checkpoint is its folder or hub id, for `llmkit run` model=hf model.path=DIR",
        ),
        ({"block_sise": 3}, "engine.block_sise: no such option; did you mean 'block_size'? (options: "),
        ({"block_size": 0}, "engine.block_size=0: Input should be greater than or equal to 1 (allowed: integer, 1"),
        ({"dtype": "fp8"}, "engine.dtype='fp8': Input should be 'auto', "),
        ({"depth": 2}, "engine.depth=2: Input should be 'auto', 0 or 1"),
        ({"engine": {"depth": 2}}, "engine.depth=2: Input should be"),
        ({"engine": EngineSettings(), "depth": 1}, "give engine settings or keywords, not both: depth"),
    ],
)
def test_wrong_options_are_refused_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr("llmkit.llm.load_model", never)
    with pytest.raises(ConfigError) as error:
        LLM(**{"model": IDS, **options})
    assert one_line(error.value).startswith(says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attention": "flash"}, "attention 'flash' cannot run model 'tiny': device cpu is not cuda"),
        ({"max_model_len": MAX_MODEL_LEN + 1}, "engine.max_model_len=129: model 'tiny' reaches 128"),
        ({"swap_gib": 4096}, "engine.swap_gib=4096.0: "),
    ],
)
def test_what_the_model_cannot_have_is_refused_before_its_weights_load(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr("llmkit.model.loading._random", never)
    with pytest.raises((ConfigError, CapacityError)) as error:
        LLM(IDS, device="cpu", **options)
    assert one_line(error.value).startswith(says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float32"}, "engine.dtype=float32: the given model 'tiny' is loaded in float64"),
        ({"device": "cuda"}, "engine.device=cuda: the given model 'tiny' is loaded on cpu"),
        ({"max_model_len": MAX_MODEL_LEN + 1}, "engine.max_model_len=129: model 'tiny' reaches 128"),
    ],
)
def test_what_the_given_model_is_not(make_llm: MakeLLM, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_llm(**options)
    assert one_line(error.value) == says


def test_too_large_a_cache_says_what_fits(make_llm: MakeLLM) -> None:
    with pytest.raises(CapacityError) as error:
        make_llm(num_blocks=1 << 24, block_size=1024)
    assert one_line(error.value).startswith("engine.num_blocks=16777216 needs ")
    fits = int(str(error.value).rpartition("num_blocks=")[2].removesuffix(" would fit"))
    assert 0 < fits < 1 << 24
    assert choose_num_blocks(7, 1, 100, 700, 700) == 7 == choose_num_blocks(None, 9, 100, 700, 900)
    assert choose_num_blocks(None, 3, 100, 700, 900) == 3
    with pytest.raises(CapacityError, match=r"num_blocks=7 would fit$"):
        choose_num_blocks(8, 1, 100, 900, 799)
    for asked in (None, 8):
        with pytest.raises(CapacityError, match=r"^no room for a KV cache: one block takes "):
            choose_num_blocks(asked, 1, 100, 99, 99)


class Broken:
    """Fails when the `at`-th request ends."""

    def __init__(self, fault: Callable[[], BaseException]) -> None:
        self.fault, self.num_ended = fault, 0

    @hookimpl
    def llmkit_request_finished(self, event: RequestEvent) -> None:
        self.num_ended += 1
        if self.num_ended == 2:
            raise self.fault()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, ZeroDivisionError])
def test_whatever_interrupts_a_call_frees_what_it_held(
    make_llm: MakeLLM, depth: int, fault: type[BaseException], expected: list[Any]
) -> None:
    llm = make_llm(depth=depth, plugins=[Broken(fault)])
    lengths = [GREEDY.model_copy(update={"max_tokens": length}) for length in (3, 5, 10)]
    with pytest.raises(fault):
        llm.generate(GOOD, lengths)
    check_nothing_left(llm)
    assert [output.token_ids for output in llm.generate(GOOD, GREEDY)] == expected[0]


@pytest.mark.parametrize("token_id", [-1, 1 << 40, 1 << 70])
def test_ids_no_tokenizer_can_hold_are_refused_like_any_other(
    make_llm: MakeLLM, speaker: dict[str, str], token_id: int
) -> None:
    good, bad = make_llm(speaker).generate(["good", [5, token_id]], SamplingParams(max_tokens=2, temperature=0))
    assert good.error is None and len(good.token_ids) >= 1
    assert f"token id {token_id} in prompt is outside the vocabulary" in bad.error
