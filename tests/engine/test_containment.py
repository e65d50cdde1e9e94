"""What is contained, what is put off and what goes up at once."""

import logging

import pytest

from llmkit.engine.containment import Containment, one_line


def test_an_error_becomes_one_line_and_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    containment = Containment()
    with caplog.at_level(logging.ERROR):
        assert containment.take(ValueError("no\nroom"), "freeing") == "freeing failed: ValueError: no"
    assert caplog.records[0].exc_info is not None
    containment.release()
    assert one_line(KeyError()) == "KeyError"


def test_interrupts_are_raised_once_when_they_are_released() -> None:
    containment, first = Containment(), KeyboardInterrupt()
    containment.take(first, "publishing")
    with pytest.raises(KeyboardInterrupt) as caught:
        containment.release()
    assert caught.value is first
    containment.release()


def test_the_first_fault_comes_up_and_the_second_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    containment = Containment()
    containment.keep(OSError("first"))
    with caplog.at_level(logging.ERROR):
        containment.keep(ValueError("second"))
    with pytest.raises(OSError, match="first"):
        containment.release()
    assert "ValueError: second" in caplog.text


def test_a_broken_invariant_is_never_contained() -> None:
    with pytest.raises(AssertionError, match="slots disagree"):
        Containment().take(AssertionError("slots disagree"), "freeing")
