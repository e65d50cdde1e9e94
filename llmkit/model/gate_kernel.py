"""The gate of a gated feed-forward layer, in float32: what the Triton kernels that compute one share."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) * up; ACTIVATION is a key of `llmkit.model.structure.ACTIVATIONS`."""
    tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "gelu_tanh")
    exponent = gate
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2 z), with z = sqrt(2 / pi) (gate + 0.044715 gate^3).
        exponent = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(exponent) * up
