"""Linear layers: merged weights take no second copy, packed ones compute what torch computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llmkit.model import linear as linear_module
from llmkit.model.linear import linear, merge


def assert_one_storage(weights: list[torch.Tensor]) -> None:
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    assert weights[0].untyped_storage().nbytes() == sum(weight.nbytes for weight in weights)


def test_merging_again_takes_no_second_copy() -> None:
    """As another engine on the same model does."""
    projections: list[Any] = [torch.nn.Linear(6, width, bias=False).requires_grad_(False) for width in (4, 2, 3)]
    wanted = torch.cat([projection.weight for projection in projections])
    once, bias = merge(projections)
    twice, _ = merge(projections)
    assert bias is None
    assert once.data_ptr() == twice.data_ptr() == projections[0].weight.data_ptr()
    assert torch.equal(once, wanted) and torch.equal(twice, wanted)
    assert_one_storage([projection.weight for projection in projections])


def test_merging_other_projections_of_a_stack_copies_them() -> None:
    """Views that do not follow each other are not mistaken for a stack."""
    projections: list[Any] = [torch.nn.Linear(6, width, bias=False).requires_grad_(False) for width in (4, 2, 3)]
    merge(projections)
    for some in ([projections[1], projections[0]], [projections[0], projections[2]]):
        wanted = torch.cat([projection.weight for projection in some])
        assert torch.equal(merge(some)[0], wanted)


PACKS = torch.cpu._is_avx512_bf16_supported() and torch.backends.mkldnn.is_available()


def is_packed(weight: torch.Tensor) -> bool:
    """A packed weight is a copy: what happens to the original later does not reach it."""
    apply = linear(weight, None)
    x = torch.ones(1, weight.shape[1], dtype=weight.dtype)
    before = apply(x)
    weight.zero_()
    return torch.equal(apply(x), before)


def test_only_small_bfloat16_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_packed(torch.ones(64, 32, dtype=torch.bfloat16)) == PACKS
    assert not is_packed(torch.ones(64, 32))
    assert not is_packed(torch.ones(64, 32, dtype=torch.float64))
    monkeypatch.setattr(linear_module, "PACK_LIMIT_BYTES", 64 * 32 * 2 - 1)
    assert not is_packed(torch.ones(64, 32, dtype=torch.bfloat16))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 3, 64])
@pytest.mark.parametrize(("width", "out"), [(32, 97), (320, 512), (864, 320)])
def test_linear_equals_torch(width: int, out: int, num_tokens: int, has_bias: bool) -> None:
    """One rounding to bfloat16 apart at most (2**-8 of the result), packed or not; bit for bit in other types."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, width, generator=generator) for n in (num_tokens, out))
    bias = torch.randn(out, generator=generator) if has_bias else None
    assert torch.equal(linear(weight, bias)(x), F.linear(x, weight, bias))
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16() if bias is not None else None
    wanted = F.linear(x.double(), weight.double(), bias.double() if bias is not None else None)
    got = linear(weight, bias)(x)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), wanted, rtol=2**-8, atol=2**-8)
