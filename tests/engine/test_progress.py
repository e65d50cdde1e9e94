"""What one request has produced: text, stops, what is held back, logprobs, times."""

import pytest

from llmkit.engine.progress import Progress
from llmkit.types import FinishReason, Request, SamplingParams, TokenLogprobs

EOS = frozenset({0})


class Pieces:
    """Token n is the n-th piece; `tail` are bytes that never became a character."""

    def __init__(self, pieces: list[str], tail: str = "") -> None:
        self.pieces, self.tail = pieces, tail

    def step(self, token_id: int) -> str:
        return self.pieces[token_id - 1]

    def flush(self) -> str:
        return self.tail


def stream(pieces: list[str], tail: str = "", **params: object) -> tuple[list[str], str, FinishReason | None]:
    """Feed all pieces as tokens: the emitted texts, the whole text, the reason to stop."""
    request = Request("a", [0], SamplingParams(max_tokens=100, **params))  # type: ignore[arg-type]
    progress = Progress(request, EOS, Pieces(pieces, tail))
    emitted: list[str] = []
    reason = None
    for token_id in range(1, len(pieces) + 1):
        reason = progress.add_token(token_id, None, 0.0)
        if reason is not None:
            break
        emitted.append(progress.take_output().text)
    last = progress.finish(reason or FinishReason.ABORT, None, 1.0)
    assert last.completion is not None and "".join([*emitted, last.text]) == last.completion.text
    return [*emitted, last.text], last.completion.text, reason


def test_without_stop_strings_text_is_emitted_at_once() -> None:
    assert stream(["a", "bc", "d"]) == (["a", "bc", "d", ""], "abcd", None)


def test_the_flushed_tail_comes_last() -> None:
    assert stream(["a", ""], tail="\ufffd") == (["a", "", "\ufffd"], "a\ufffd", None)


@pytest.mark.parametrize("pieces", [["x", "STOP", "y"], ["xS", "T", "OPy"], ["x", "S", "T", "O", "P"], ["xSTOPy"]])
def test_a_stop_string_is_cut_wherever_the_tokens_part_it(pieces: list[str]) -> None:
    _, text, reason = stream(pieces, stop=("STOP",))
    assert (text, reason) == ("x", FinishReason.STOP)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    emitted, text, _ = stream(["ab", "cS", "T", "of"], stop=("STOP",))
    assert emitted == ["", "a", "b", "cS", "Tof"] and text == "abcSTof"


def test_the_earliest_of_several_stop_strings_wins() -> None:
    assert stream(["one two three"], stop=("three", "two"))[1] == "one "


def test_stop_strings_and_tokens_wait_for_min_tokens() -> None:
    _, text, reason = stream(["xab", "c", "d", "ab", "e"], stop=("ab",), min_tokens=3)
    assert (text, reason) == ("xabcd", FinishReason.STOP)
    request = Request("a", [5], SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=(3,)))
    progress = Progress(request, EOS)
    assert [progress.add_token(token, None, 0.0) for token in (0, 3)] == [None, FinishReason.STOP]


def test_a_stop_string_from_before_min_tokens_does_not_count_later() -> None:
    assert stream(["xab", "c", "d"], stop=("ab",), min_tokens=2) == (["xa", "b", "c", "d"], "xabcd", None)


def test_the_end_token_is_counted_but_not_shown() -> None:
    progress = Progress(Request("a", [5], SamplingParams(max_tokens=9)), EOS, Pieces(["x"]))
    assert progress.add_token(1, None, 0.0) is None
    assert progress.add_token(0, None, 0.0) is FinishReason.STOP
    completion = progress.finish(FinishReason.STOP, None, 0.0).completion
    assert completion is not None and (completion.text, completion.token_ids) == ("x", (1, 0))


def test_ignore_eos_still_heeds_stop_token_ids() -> None:
    progress = Progress(Request("a", [5], SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=(3,))), EOS)
    assert [progress.add_token(token, None, 0.0) for token in (0, 3)] == [None, FinishReason.STOP]


def test_the_length_limit_ends_it() -> None:
    progress = Progress(Request("a", [5], SamplingParams(max_tokens=2)), EOS)
    assert [progress.add_token(9, None, 0.0) for _ in range(2)] == [None, FinishReason.LENGTH]


def test_logprobs_are_returned_when_asked_for() -> None:
    entry = TokenLogprobs(9, -0.5, 1)
    for asked, wanted in ((0, (entry,)), (None, None)):
        progress = Progress(Request("a", [5], SamplingParams(max_tokens=1, logprobs=asked)), EOS)
        progress.add_token(9, entry, 0.0)
        completion = progress.finish(FinishReason.LENGTH, None, 0.0).completion
        assert completion is not None and completion.logprobs == wanted


def test_prompt_logprobs_computed_again_replace_the_first() -> None:
    progress = Progress(Request("a", [5, 6, 7], SamplingParams(prompt_logprobs=0)), EOS)
    first, again, last = (TokenLogprobs(6, -x, 1) for x in (1.0, 1.0, 2.0))
    progress.add_prompt_logprobs(0, (first,))
    progress.add_prompt_logprobs(0, (again,))
    progress.add_prompt_logprobs(1, (last,))
    assert progress.prompt_logprobs == [again, last]


def test_times_are_none_until_they_happened() -> None:
    progress = Progress(Request("a", [5], SamplingParams(), arrival_time=2.0), EOS)
    assert (progress.metrics().ttft, progress.metrics().e2el) == (None, None)
    progress.add_token(9, None, 3.0)
    progress.add_token(9, None, 4.0)
    progress.finish(FinishReason.ABORT, None, 7.0)
    assert (progress.metrics().ttft, progress.metrics().e2el) == (1.0, 5.0)
