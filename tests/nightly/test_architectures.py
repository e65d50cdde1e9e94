"""The nightly round of architectures in small: what is equal, what is refused, and that a difference is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.equality.arrangements import CHOICES
from tests.equality.zoo import ZOO, every_name
from tests.nightly import architectures
from tests.nightly.architectures import arrange, look_at, try_out
from tests.nightly.models_page import Finding, write_models_page
from tests.nightly.page import Circumstances

WHERE = Circumstances("abc", "3.13", "make nightly", 120.0)
SAMPLE = {
    "bert": "MHA, no rotary, bias, LayerNorm",
    "gemma4_text": "GQA, heads of 8 and 512, window in 1 of 3 layers, own scale, qk-norm, norms on both sides",
    "modernbert-decoder": "MHA, window in 1 of 3 layers, LayerNorm",
}
"""Architectures that no other test of the default suite runs."""


@pytest.fixture(autouse=True)
def quiet(recwarn: pytest.WarningsRecorder) -> None:
    """Transformers warns about what some tiny configs leave out."""


@pytest.mark.parametrize("name", SAMPLE)
def test_equal_and_what_is_special_is_seen(name: str) -> None:
    found = look_at(name)
    assert ", ".join(found.special) == SAMPLE[name] and not found.is_fused
    ((_, cases),) = arrange([found])
    tried = try_out((found, cases[:2]))
    assert tried.failures == () and tried.num_runs == 2 and 0 < tried.error < 1e-9


def test_every_causal_lm_of_transformers_is_gone_through() -> None:
    assert {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *ZOO} == set(every_name())


def test_every_architecture_meets_every_choice() -> None:
    findings = [Finding("llama", special=("GQA",)), Finding("bloom", refusal="no"), Finding("gemma2", special=("GQA",))]
    findings += [Finding("x", failures=("y",)), Finding("z", untried="large")]
    arranged = arrange(findings)
    assert [finding.name for finding, _ in arranged] == ["llama", "gemma2"]
    for _, cases in arranged:
        for choice, values in CHOICES.items():
            assert {case[choice] for case in cases} == set(values), choice


def test_a_difference_is_named_and_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(**case: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(architectures, "run", wrong)
    cases: list[dict[str, object]] = [{"model": "llama", "cache": "radix"}]
    tried = try_out((Finding("llama"), cases))
    assert tried.failures == ("llama radix: raise AssertionError",)
    equal = Finding("gemma2", special=("GQA", "softcap"), num_runs=8, error=3e-14)
    page = write_models_page([equal, tried, look_at("bloom"), look_at("nothing")], "transformers 5", WHERE)
    assert "| nothing | model 'nothing': bad config: " in page.partition("## Not tried (1)")[2]
    assert "**1 of 4 are equal to `transformers.generate`, 1 are refused by name, 1 differ; 1 could " in page
    assert "| gemma2 | GQA, softcap | transformers' | 8 | 3e-14 |" in page
    assert "| bloom | their forward takes no position_ids |" in page
    assert "meta" not in look_at("jetmoe").refusal, "torch's own words about tensors without values"
    assert page.endswith("## Failures\n\n- llama radix: raise AssertionError\n")


def test_the_command_writes_the_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def findings(names: list[str], workers: int) -> list[Finding]:
        return [Finding(name, num_runs=1) for name in names]

    monkeypatch.setattr(architectures, "go_through", findings)
    page = tmp_path / "page.md"
    assert architectures.main(["--names", "llama", "gpt2", "--page", str(page)]) == 0
    assert "`python -m tests.nightly.architectures --names llama gpt2` wrote" in page.read_text()
    assert "**2 of 2 are equal" in page.read_text() and "## Not tried" not in page.read_text()
