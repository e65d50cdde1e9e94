"""`LLM.stream` and text: increments add up to `generate`, characters stay whole, stop strings are never shown."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from llmkit import LLM, FinishReason, RequestOutput, SamplingParams
from llmkit.outputs import StreamOutput
from tests.tiny_llm import END, SCRIPT, MakeLLM, check_nothing_left

SPOKEN = SCRIPT.removesuffix(END)
SPEAK = SamplingParams(temperature=0.0, max_tokens=60)
PIECES = ["ab", "\u00e9", " ", "\u20ac", "1", "\U0001f600", "xy", "z", ".", "_", "s", "t", "OP", "\n"]
"""`SPOKEN` as it becomes certain, token by token."""


@pytest.fixture
def llm(make_llm: MakeLLM, speaker: dict[str, str]) -> LLM:
    return make_llm(speaker, depth=0)


def joined(pieces: list[StreamOutput]) -> dict[tuple[int, int], tuple[str, tuple[int, ...], Any, Any]]:
    """Text, tokens, reason and error of each sample, put together again."""
    whole: dict[tuple[int, int], tuple[str, tuple[int, ...], Any, Any]] = {}
    for piece in pieces:
        key = piece.prompt_index, piece.index
        text, token_ids, reason, _ = whole.get(key, ("", (), None, None))
        assert reason is None, "an increment after the last"
        whole[key] = text + piece.text, token_ids + piece.token_ids, piece.finish_reason, piece.error
    return whole


def parts(outputs: list[RequestOutput]) -> dict[tuple[int, int], tuple[str, tuple[int, ...], Any, Any]]:
    return {
        (number, c.index): (c.text, c.token_ids, c.finish_reason, c.error)
        for number, output in enumerate(outputs)
        for c in output.completions
    }


def test_it_speaks(llm: LLM) -> None:
    start, end = llm.generate(["ab", "P"], SPEAK)
    assert (start.text, start.finish_reason) == (SPOKEN[2:], FinishReason.STOP)
    assert end.token_ids != start.token_ids


def test_characters_are_never_parted(llm: LLM) -> None:
    pieces = list(llm.stream("\n" + END + "ab", SPEAK))
    assert [piece.text for piece in pieces if piece.text] == PIECES[1:]
    assert sum(len(piece.token_ids) for piece in pieces) == len(llm.encode(SCRIPT)) - 1
    assert len(llm.encode(SCRIPT)) > len(PIECES) + 5


@pytest.mark.parametrize("depth", [0, 1])
def test_increments_add_up(make_llm: MakeLLM, speaker: dict[str, str], depth: int) -> None:
    """Also for noise: random bytes, broken characters and all."""
    llm = make_llm(speaker, depth=depth)
    hot = SamplingParams(temperature=50.0, max_tokens=30, ignore_eos=True, n=3, seed=1)
    multibyte = tuple(llm.encode("\u00e9\u20ac\U0001f600z"))
    prompts = ["ab", "x", [3, 200, 201], [*range(120, 140), *llm.encode("z")], [5], []]
    params = [
        SPEAK,
        hot,
        hot.model_copy(update={"seed": 2, "stop": ("a", "\ufffd", "Q")}),
        hot.model_copy(update={"seed": 3, "allowed_token_ids": multibyte}),
        hot.model_copy(update={"seed": 4, "allowed_token_ids": multibyte, "stop": ("z\u00e9", "\ufffdz")}),
        hot,
    ]
    pieces = list(llm.stream(prompts, params))
    outputs = llm.generate(prompts, params)
    assert joined(pieces) == parts(outputs)
    assert [output.finish_reason for output in outputs][-1] is FinishReason.ERROR
    noisy = outputs[1].text + outputs[3].text
    assert noisy.count("\ufffd") > 10 and "z" in noisy
    for output in outputs[1], outputs[3]:
        for completion in output.completions:
            assert completion.text == llm.model.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_text_follows_a_prompt_that_ends_inside_a_character(llm: LLM) -> None:
    euro = llm.encode("ab \u20ac")
    for number in (1, 2):
        (output,) = llm.generate([euro[:-number]], SPEAK)
        assert output.text == "\u20ac" + SPOKEN.partition("\u20ac")[2]
    broken = [*llm.encode("ab"), 255 - 60, *llm.encode("\u20ac")[:1]]
    only_z = SamplingParams(max_tokens=2, allowed_token_ids=tuple(llm.encode("z")))
    assert llm.generate([broken], only_z)[0].text == "zz"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("1",), "\u00e9 \u20ac"),
        (("\u20ac",), "\u00e9 "),
        (("\u20ac1\U0001f600",), "\u00e9 "),
        (("y",), "\u00e9 \u20ac1\U0001f600x"),
        (("\U0001f600x",), "\u00e9 \u20ac1"),
        (("tO",), SPOKEN[2:].partition("tO")[0]),
        (("z._stOP\n",), SPOKEN[2:].partition("z")[0]),
        (("._st!", "stOP", "OP\n"), SPOKEN[2:].partition("st")[0]),
        (("OP", "tOP", "stOP"), SPOKEN[2:].partition("st")[0]),
        (("z._stOP\n!", "yz"), SPOKEN[2:].partition("yz")[0]),
    ],
)
def test_stop_strings_are_cut_and_never_shown(llm: LLM, stop: tuple[str, ...], text: str) -> None:
    params = SPEAK.model_copy(update={"stop": stop})
    (output,) = llm.generate("ab", params)
    assert (output.text, output.finish_reason) == (text, FinishReason.STOP)
    pieces, shown = list(llm.stream("ab", params)), ""
    for piece in pieces:
        shown += piece.text
        assert text.startswith(shown), "part of a stop string was shown"
    assert shown == text and sum(len(piece.token_ids) for piece in pieces) == len(output.token_ids)
    whole, before = (llm.model.tokenizer.decode(ids) for ids in (output.token_ids, output.token_ids[:-1]))
    assert any(s in whole for s in stop) and not any(s in before for s in stop)


def test_a_stop_string_that_does_not_come_holds_nothing_back_for_ever(llm: LLM) -> None:
    pieces = list(llm.stream("ab", SPEAK.model_copy(update={"stop": ("stOP!",), "max_tokens": 60})))
    assert "".join(piece.text for piece in pieces) == SPOKEN[2:]
    assert len([piece for piece in pieces if piece.text]) > 5


def test_min_tokens_outlasts_a_stop_string(llm: LLM) -> None:
    (early,) = llm.generate("ab", SPEAK.model_copy(update={"stop": ("1",)}))
    num = len(early.token_ids)
    at, after = (SPEAK.model_copy(update={"stop": ("1",), "min_tokens": n}) for n in (num, num + 1))
    on_time, late = llm.generate(["ab"] * 2, [at, after])
    assert on_time.text == early.text and late.text == SPOKEN[2:]


@pytest.mark.parametrize("ends_by", ["length", "stop id"])
def test_an_incomplete_character_at_the_end_is_shown_as_such(llm: LLM, ends_by: str) -> None:
    """Whatever ends it: bytes that were generated do not vanish."""
    ids = llm.encode(SPOKEN)
    cut = ids.index(llm.encode("\u20ac")[0]) + 2
    update = {"max_tokens": cut - 1} if ends_by == "length" else {"stop_token_ids": (ids[cut],)}
    (output,) = llm.generate("ab", SPEAK.model_copy(update=update))
    assert output.text == "\u00e9 \ufffd"


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("num_taken", [1, 4])
def test_stopping_early_aborts_and_leaks_nothing(
    make_llm: MakeLLM, speaker: dict[str, str], depth: int, num_taken: int
) -> None:
    llm = make_llm(speaker, depth=depth, scheduler={"name": "continuous", "max_num_seqs": 2})
    wanted = [output.text for output in llm.generate(["ab", "1", "x"], SPEAK)]
    for bad_first in (False, True):
        stream = llm.stream([[]] * bad_first + ["ab", "1", "x"], SPEAK)
        taken = [next(stream) for _ in range(num_taken)]
        assert (taken[0].error is not None) == bad_first
        stream.close()
        check_nothing_left(llm)
        assert list(stream) == []
    assert [output.text for output in llm.generate(["ab", "1", "x"], SPEAK)] == wanted


@pytest.mark.parametrize("depth", [0, 1])
def test_aborting_one_leaves_the_others(make_llm: MakeLLM, speaker: dict[str, str], depth: int) -> None:
    llm = make_llm(speaker, depth=depth)
    alone = parts(llm.generate(["ab", "\u00e9"], SPEAK))
    pieces: list[StreamOutput] = []
    for piece in (stream := llm.stream(["ab", "\u00e9"], SPEAK)):
        pieces.append(piece)
        if len(pieces) == 5:
            llm.engine.abort([min(llm.engine.planner.requests), "nobody"])
    whole = joined(pieces)
    assert list(stream) == [] and whole[1, 0] == alone[1, 0]
    text, token_ids, reason, error = whole[0, 0]
    assert (reason, error) == (FinishReason.ABORT, None) and 0 < len(token_ids) < len(alone[0, 0][1])
    assert alone[0, 0][0].startswith(text.removesuffix("\ufffd")) and alone[0, 0][1][: len(token_ids)] == token_ids


@pytest.mark.parametrize("depth", [0, 1])
def test_calls_in_the_middle_of_a_stream(make_llm: MakeLLM, speaker: dict[str, str], depth: int) -> None:
    """Whoever steps the engine, every increment reaches the stream it belongs to."""
    llm = make_llm(speaker, depth=depth)
    wanted = parts(llm.generate(["ab", "1"], SPEAK))
    stream, other = llm.stream(["ab", "1"], SPEAK), llm.stream("x", SPEAK)
    pieces = [next(stream)]
    rest = [next(other)]
    (inner,) = llm.generate("1", SPEAK.model_copy(update={"max_tokens": 30}))
    assert (inner.text, inner.token_ids) == wanted[1, 0][:2]
    pieces += [next(stream)]
    rest += list(other)
    assert joined(pieces + list(stream)) == wanted
    assert joined(rest) == parts(llm.generate("x", SPEAK))


def test_increments_come_as_soon_as_they_are_known(llm: LLM) -> None:
    steps = []
    for piece in llm.stream(["ab", "1"], SPEAK):
        steps.append((llm.engine.planner.num_planned_steps, piece.prompt_index))
    assert steps[:4] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert all(later >= sooner for sooner, later in pairwise(step for step, _ in steps))
