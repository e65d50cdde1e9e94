"""Which attention backend serves a model, and what is said where one cannot."""

from __future__ import annotations

import pytest

from llmkit import LLM, ConfigError, Registry, hookimpl
from tests.tiny_llm import IDS


class DeafAttention:
    """Nothing suits it."""

    preferred_block_size = 16

    @staticmethod
    def check(requirements: object) -> list[str]:
        return ["it is deaf"]


class Deaf:
    """Brings a backend that serves nobody and one that cannot be imported, and bids for nothing."""

    @hookimpl
    def llmkit_register(self, registry: Registry) -> None:
        registry.add_attention("deaf", "tests.engine.test_backends:DeafAttention")
        registry.add_attention("broken", "tests.no_such_module:Attention")


def test_an_error_names_the_backends_that_could() -> None:
    with pytest.raises(ConfigError) as error:
        LLM(IDS, attention="deaf", device="cpu", plugins=[Deaf()])
    assert str(error.value) == "attention 'deaf' cannot run model 'tiny': it is deaf (these can, here: sdpa)"


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        ("deaf", "attention 'deaf' cannot run model 'tiny': it is deaf (these can, here: none)"),
        ("auto", "attention=auto: no installed backend bids for cpu (these can, here: none)"),
    ],
)
def test_an_error_says_so_if_none_could(monkeypatch: pytest.MonkeyPatch, attention: str, says: str) -> None:
    monkeypatch.setenv("LLMKIT_BLOCK", "llmkit:attention")
    with pytest.raises(ConfigError) as error:
        LLM(IDS, attention=attention, device="cpu", plugins=[Deaf()])
    assert str(error.value) == says
