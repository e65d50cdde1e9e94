"""Arrivals, lengths, prefixes and prompts: the distributions that were asked for, and the same ones every time."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import ConfigError
from llmkit.workload.arrivals import arrival_times
from llmkit.workload.lengths import sample_lengths
from llmkit.workload.protocol import ModelBounds
from llmkit.workload.requests import TimedRequest, check_fits
from llmkit.workload.settings import GammaSettings, SyntheticSettings, parse_axis, parse_lengths
from llmkit.workload.synthesis import synthesise

BOUNDS = ModelBounds(vocab_size=50, max_model_len=1000, encode=lambda text: list(text.encode()))


def settings(**changes: object) -> SyntheticSettings:
    return SyntheticSettings.model_validate({"num_requests": 40} | changes)


@given(st.integers(1, 200), st.floats(0.01, 1e4), st.floats(0.01, 50), st.integers(0, 1 << 32))
def test_arrivals_rise_and_the_last_lands_at_n_over_rate(size: int, rate: float, shape: float, seed: int) -> None:
    times = arrival_times(size, rate, shape, np.random.default_rng(seed))
    assert times.shape == (size,)
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] == size / rate


def test_an_infinite_rate_is_all_at_once() -> None:
    assert arrival_times(5, math.inf, 1.0, np.random.default_rng(0)).tolist() == [0.0] * 5


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_burstiness_is_the_shape_of_the_gaps(shape: float) -> None:
    gaps = np.diff(arrival_times(40_000, 10.0, shape, np.random.default_rng(1)))
    assert gaps.mean() == pytest.approx(0.1, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(shape), rel=0.05)


def test_fixed_and_uniform_lengths() -> None:
    rng = np.random.default_rng(0)
    assert sample_lengths(7, 3, rng).tolist() == [7, 7, 7]
    drawn = sample_lengths((3, 5), 3000, rng)
    assert set(drawn.tolist()) == {3, 4, 5}
    assert np.bincount(drawn)[3:].min() > 900


def test_a_quantile_table_is_met() -> None:
    table = ((0.0, 10), (0.5, 100), (0.9, 1000), (1.0, 5000))
    drawn = sample_lengths(table, 50_000, np.random.default_rng(0))
    for quantile, length in table[1:3]:
        assert np.quantile(drawn, quantile) == pytest.approx(length, rel=0.05)
    assert drawn.min() >= 10
    assert drawn.max() <= 5000


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("12", "give N"),
        (0, "give N"),
        (True, "give N"),
        ([5], "give N"),
        ([9, 3], "above the high end"),
        ([[0, 3], [1, "x"]], "is not"),
        ([[0.1, 3], [1, 4]], "starts at 0"),
        ([[0, 3], [0.5, 4], [0.5, 5], [1, 9]], "rise strictly"),
        ([[0, 3], [1, 2]], "must not fall"),
    ],
)
def test_bad_lengths_are_told(value: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_lengths(value)


@pytest.mark.parametrize("value", [[], [0], [1, 1], ["a"], None])
def test_bad_axes_are_told(value: object) -> None:
    with pytest.raises(ValueError, match=r"list|twice"):
        parse_axis(value)


def test_settings_survive_a_round_trip_through_plain_data() -> None:
    before = settings(prompt_len=[[0, 1], [0.5, 20], [1, 30]], max_tokens=[4, 8])
    after = SyntheticSettings.model_validate(before.model_dump(mode="json"))
    assert after == before
    assert hash(after) == hash(before)


def test_same_seed_same_requests_and_another_seed_others() -> None:
    first, again = (synthesise(settings(), 5.0, 1.0, BOUNDS) for _ in range(2))
    assert first == again
    assert synthesise(settings(seed=1), 5.0, 1.0, BOUNDS) != first


def test_global_random_state_is_neither_read_nor_moved() -> None:
    first = synthesise(settings(), 5.0, 1.0, BOUNDS)
    random.seed(99)
    np.random.seed(99)
    before = (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index, union-attr]
    assert synthesise(settings(), 5.0, 1.0, BOUNDS) == first
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index, union-attr]


def test_the_rate_changes_arrivals_only() -> None:
    slow, fast = (synthesise(settings(), rate, 1.0, BOUNDS) for rate in (1.0, 4.0))
    assert [r.prompt_token_ids for r in slow] == [r.prompt_token_ids for r in fast]
    assert [r.max_tokens for r in slow] == [r.max_tokens for r in fast]
    assert slow[7].arrival_time == pytest.approx(4 * fast[7].arrival_time)


def test_tokens_and_lengths_stay_within_bounds() -> None:
    requests = synthesise(settings(prompt_len=(2, 9), max_tokens=(3, 4), num_requests=500), math.inf, 1.0, BOUNDS)
    assert {len(r.prompt_token_ids) for r in requests} == set(range(2, 10))
    assert {r.max_tokens for r in requests} == {3, 4}
    tokens = {token for r in requests for token in r.prompt_token_ids}
    assert tokens == set(range(50))


def test_requests_of_a_group_share_exactly_the_prefix() -> None:
    requests = synthesise(settings(prefix_groups=3, prefix_len=20, prompt_len=5, num_requests=60), 5.0, 1.0, BOUNDS)
    groups: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for request in requests:
        assert len(request.prompt_token_ids) == 25
        groups.setdefault(request.prompt_token_ids[:20], set()).add(request.prompt_token_ids[20:])
    assert len(groups) == 3
    assert sum(map(len, groups.values())) == 60


def test_priorities_are_drawn_from_the_given_number() -> None:
    assert {r.priority for r in synthesise(settings(priorities=3), 5.0, 1.0, BOUNDS)} == {0, 1, 2}
    assert {r.priority for r in synthesise(settings(), 5.0, 1.0, BOUNDS)} == {0}


def test_tenants_share_as_asked_for() -> None:
    assert {r.tenant for r in synthesise(settings(), 5.0, 1.0, BOUNDS)} == {""}
    requests = synthesise(settings(tenants=3, tenant_skew=1.0, num_requests=6000), 5.0, 1.0, BOUNDS)
    counts = Counter(r.tenant for r in requests)
    for name, share in (("tenant0", 6 / 11), ("tenant1", 3 / 11), ("tenant2", 2 / 11)):
        assert counts[name] / 6000 == pytest.approx(share, abs=0.02)


def test_deadlines_fall_between_the_bounds_after_arrival() -> None:
    assert {r.deadline for r in synthesise(settings(), 5.0, 1.0, BOUNDS)} == {None}
    requests = synthesise(settings(deadline_seconds=(2.0, 6.0), num_requests=2000), 5.0, 1.0, BOUNDS)
    slack = [(r.deadline or 0.0) - r.arrival_time for r in requests]
    assert min(slack) >= 2.0 and max(slack) <= 6.0 and np.mean(slack) == pytest.approx(4.0, abs=0.1)
    for wrong in ((3.0, 2.0), (-1.0, 2.0), (0.0, float("inf"))):
        with pytest.raises(ValueError, match=r"give \[LOW, HIGH\]"):
            settings(deadline_seconds=wrong)


def test_hints_are_as_far_off_as_asked_for() -> None:
    assert {r.length_hint for r in synthesise(settings(), 5.0, 1.0, BOUNDS)} == {None}
    assert all(r.length_hint == r.max_tokens for r in synthesise(settings(hint_error=0.0), 5.0, 1.0, BOUNDS))
    requests = synthesise(settings(hint_error=0.5, max_tokens=1000, num_requests=5000), 5.0, 1.0, BOUNDS)
    errors = np.log([(r.length_hint or 0) / r.max_tokens for r in requests])
    assert errors.mean() == pytest.approx(0.0, abs=0.03) and errors.std() == pytest.approx(0.5, rel=0.05)
    plain = synthesise(settings(max_tokens=1000, num_requests=5000), 5.0, 1.0, BOUNDS)
    assert [r.prompt_token_ids for r in requests] == [r.prompt_token_ids for r in plain]


def test_prompts_cut_from_a_text_are_pieces_of_it(tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog; "
    path = tmp_path / "text.txt"
    path.write_text(text)
    for request in synthesise(settings(prompt_file=str(path), prompt_len=(3, 100)), 5.0, 1.0, BOUNDS):
        assert bytes(request.prompt_token_ids).decode() in text * 4


def test_a_text_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfd")
    for name, problem in (("missing", "cannot be read"), ("bytes", "cannot be read"), ("empty", "no text")):
        with pytest.raises(ConfigError, match=problem):
            synthesise(settings(prompt_file=str(tmp_path / name)), 5.0, 1.0, BOUNDS)
    with pytest.raises(ConfigError, match="no tokenizer"):
        synthesise(settings(prompt_file=str(tmp_path / "empty")), 5.0, 1.0, ModelBounds(50, 1000))


def test_a_prefix_needs_both_of_its_numbers() -> None:
    with pytest.raises(ValueError, match="go together"):
        settings(prefix_len=4)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        GammaSettings(rate=0.0)


def test_what_cannot_fit_the_model_is_refused_before_anything_runs() -> None:
    bounds = ModelBounds(vocab_size=10, max_model_len=6)
    check_fits("x", [TimedRequest(0.0, (1, 9), 4)], bounds)
    with pytest.raises(ConfigError, match=r"x needs sequences of 7 tokens .* hold 6"):
        check_fits("x", [TimedRequest(0.0, (1,), 1), TimedRequest(0.0, (1, 2), 5)], bounds)
    with pytest.raises(ConfigError, match=r"token ids up to 10, .* \[0, 10\)"):
        check_fits("x", [TimedRequest(0.0, (10,), 1)], bounds)
