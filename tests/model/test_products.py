"""Which products take a bias of zeros along: by a clock of the test, and on a GPU by the device's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llmkit.engine.captured import Captured
from llmkit.model import products
from llmkit.model.linear import linear
from llmkit.model.products import MARGIN, MIN_BYTES, NUM_RUNS, READ_BYTES, Product, has_choice, measuring

OUT, WIDTH = 8, 4
PER_RUN = 3
"""How many of the weights of these tests a run reads."""


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    products.kind_of.cache_clear()
    yield
    products.kind_of.cache_clear()


class Clock:
    """A launch takes a second, or `with_zeros` with a bias. A run in `late` takes a minute more."""

    def __init__(self, with_zeros: float, late: Sequence[int] = ()) -> None:
        self.with_zeros, self.late = with_zeros, late
        self.runs: list[list[Any]] = []

    def __call__(self, launches: Sequence[Any]) -> float:
        self.runs.append([launch.args[1] for launch in launches])
        seconds = sum(1.0 if launch.args[2] is None else self.with_zeros for launch in launches)
        return seconds + (60.0 if len(self.runs) - 1 in self.late else 0.0)


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[Product]:
    """As many as two runs read. What they take along is 1 instead of 0, so that it is seen."""
    generator = torch.Generator().manual_seed(0)
    made = [Product(torch.randn(OUT, WIDTH, generator=generator)) for _ in range(2 * PER_RUN)]
    monkeypatch.setattr(products, "READ_BYTES", made[0].weight.nbytes * PER_RUN - 1)
    made[0].kind.zeros.fill_(1)
    return made


def run(layers: Sequence[Product], rows: int = 3) -> list[bool]:
    """One product after the other; whether each took the bias along."""
    x = torch.linspace(-1, 1, rows * WIDTH).view(rows, WIDTH)
    took = []
    for layer in layers:
        got, wanted = layer(x), F.linear(x, layer.weight)
        assert torch.equal(got, wanted) or torch.allclose(got, wanted + 1)
        took.append(not torch.equal(got, wanted))
    return took


@pytest.mark.parametrize(("with_zeros", "wanted"), [(0.5, True), (MARGIN * 0.99, True), (MARGIN, False), (2.0, False)])
def test_the_faster_way_is_taken_from_then_on(layers: list[Product], with_zeros: float, wanted: bool) -> None:
    with measuring(Clock(with_zeros)):
        assert not any(run(layers)), "nobody knows yet"
    assert run(layers) == [wanted] * len(layers)
    assert not any(run(layers, rows=5)), "another number of rows"


def test_all_layers_are_measured_once_over_weights_in_turn(layers: list[Product]) -> None:
    clock = Clock(0.5)
    for _ in range(2):
        with measuring(clock):
            run(layers)
    assert len(clock.runs) == 2 * (NUM_RUNS + 1)
    for weights in clock.runs:
        assert [id(weight) for weight in weights] == [id(layer.weight) for layer in layers[:PER_RUN]]


@pytest.mark.parametrize("late", [[0], [1], [0, 2], [4], [3, 1]])
def test_neither_the_first_run_nor_one_that_is_late_decides(layers: list[Product], late: list[int]) -> None:
    """Runs without and with a bias take turns: even ones are without."""
    for rows, with_zeros in ((3, 0.5), (4, 2.0)):
        with measuring(Clock(with_zeros, late)):
            run(layers, rows)
    assert all(run(layers, 3)) and not any(run(layers, 4))


def test_shapes_decide_for_themselves(layers: list[Product]) -> None:
    others = [Product(torch.randn(2 * OUT, WIDTH)) for _ in range(PER_RUN)]
    others[0].kind.zeros.fill_(1)
    with measuring(Clock(0.5)):
        run(layers)
    clock = Clock(2.0)
    with measuring(clock):
        assert all(run(layers)) and not any(run(others))
    assert all(run(layers)) and not any(run(others))
    assert all(len(weight) == 2 * OUT for weights in clock.runs for weight in weights)


@pytest.mark.parametrize("rows", [1, 257])
def test_other_numbers_of_rows_are_not_measured(layers: list[Product], rows: int) -> None:
    clock = Clock(0.5)
    with measuring(clock):
        run(layers, rows)
    assert not clock.runs and not any(run(layers, rows))


def test_a_step_with_too_few_weights_to_tell_is_left_alone(layers: list[Product]) -> None:
    clock = Clock(0.5)
    with measuring(clock):
        run(layers[: PER_RUN - 1])
    assert not clock.runs and not any(run(layers))


def test_only_steps_inside_are_measured(layers: list[Product]) -> None:
    with measuring(Clock(0.5)):
        run(layers, 3)
    assert not any(run(layers, 4)) and layers[0].kind.takes_zeros == {3: True}
    assert products._met.get() is None, "what runs outside is not kept"


def test_a_step_that_fails_decides_nothing(layers: list[Product]) -> None:
    clock = Clock(0.5)
    with pytest.raises(ValueError, match="broken"), measuring(clock):
        run(layers)
        raise ValueError("broken")
    assert not clock.runs and not layers[0].kind.takes_zeros
    with measuring(clock):
        run(layers)
    assert all(run(layers))


def test_layers_on_a_cpu_have_no_choice() -> None:
    weight = torch.empty(MIN_BYTES // 4, 2, dtype=torch.bfloat16)
    assert not has_choice(weight, None) and not isinstance(linear(weight, None), Product)


LARGE_OUT, LARGE_WIDTH = 4096, 8192


@pytest.fixture
def large() -> list[Product]:
    """On a GPU: as many weights as a run reads, and two more."""
    generator = torch.Generator("cuda").manual_seed(0)
    num = -(-READ_BYTES // (LARGE_OUT * LARGE_WIDTH * 2)) + 2
    made: list[Any] = []
    for _ in range(num):
        weight = torch.randn(LARGE_OUT, LARGE_WIDTH, device="cuda", generator=generator, dtype=torch.bfloat16)
        made.append(linear(weight, None))
    assert all(isinstance(layer, Product) for layer in made)
    return made


def inputs_of(rows: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(rows)
    return torch.randn(rows, LARGE_WIDTH, device="cuda", generator=generator, dtype=torch.bfloat16)


@pytest.mark.cuda
def test_biases_small_weights_and_float32_have_no_choice_on_a_gpu() -> None:
    weight = torch.empty(MIN_BYTES // 4, 2, dtype=torch.bfloat16, device="cuda")
    assert has_choice(weight, None) and has_choice(weight.half(), None)
    assert not has_choice(weight, weight[:, 0]) and not has_choice(weight[1:], None)
    assert not has_choice(weight.float(), None)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [2, 16, 33, 64, 96, 256])
def test_both_ways_are_as_exact(large: list[Product], rows: int) -> None:
    """Products with the zeros are as near to float64 as rounding it to bfloat16, or as products without."""
    x, layer = inputs_of(rows), large[0]
    wanted = F.linear(x.double(), layer.weight.double())
    found = [wanted.bfloat16()]
    for takes_zeros in (False, True):
        layer.kind.takes_zeros[rows] = takes_zeros
        found.append(layer(x))
    rounding, without, with_zeros = (float((one.double() - wanted).norm() / wanted.norm()) for one in found)
    assert with_zeros <= 1.1 * max(rounding, without)
    assert rounding > 0 and without < 2**-8


@pytest.mark.cuda
@pytest.mark.parametrize("takes_zeros", [False, True])
def test_weights_come_from_memory_when_they_are_timed(large: list[Product], takes_zeros: bool) -> None:
    """Hardly faster than a copy, as they would be from the L2 cache."""
    met, zeros = products.Met(inputs_of(64), [layer.weight for layer in large]), large[0].kind.zeros
    source = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    target, seen = torch.empty_like(source), []
    copied = min(products.device_seconds([lambda: target.copy_(source)]) for _ in range(5)) / (2 * source.nbytes)

    def seconds(launches: Sequence[Any]) -> float:
        took = products.device_seconds(launches)
        if (launches[0].args[2] is not None) == takes_zeros:
            seen.append(took / sum(launch.args[1].nbytes for launch in launches))
        return took

    products.is_faster_with(zeros, met, seconds)
    assert len(seen) == NUM_RUNS + 1 and min(seen) > copied / 1.2


@pytest.mark.cuda
@pytest.mark.parametrize("takes_zeros", [False, True])
def test_captures_follow_what_was_measured_before_them(
    large: list[Product], takes_zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second capture measures nothing; replays and steps that are not captured give the same, bit for bit."""
    real, launched, rows, kind = products.device_seconds, [], 48, large[0].kind

    def seconds(launches: Sequence[Any]) -> float:
        assert not torch.cuda.is_current_stream_capturing()
        assert real(launches) > 0
        launched.append(len(launches))
        return 1.0 if (launches[0].args[2] is not None) == takes_zeros else 2.0

    monkeypatch.setattr(products, "device_seconds", seconds)
    x, zeros = inputs_of(rows), torch.zeros(2, rows, dtype=torch.long, device="cuda")

    def step(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([layer(x) for layer in large]), inputs + 1

    pool = torch.cuda.graph_pool_handle()
    with torch.inference_mode():
        for _ in range(2):
            captured = Captured.of(step, zeros.clone(), pool)
            assert len(launched) == 2 * (NUM_RUNS + 1)
            replayed = captured.replay(zeros.cpu().numpy(), len(large)).logits
            assert kind.takes_zeros == {rows: takes_zeros}
            bias = kind.zeros if takes_zeros else None
            for got, layer in zip(replayed, large, strict=True):
                assert torch.equal(got, F.linear(x, layer.weight, bias)) and torch.equal(got, layer(x))
