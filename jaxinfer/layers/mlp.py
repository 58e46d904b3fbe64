"""The gated feed-forward layer."""

import jax
from jaxtyping import Array, Float

from jaxinfer.layers.linear import Linear, linear
from jaxinfer.ops import Ops
from jaxinfer.tree import Index, pytree


@pytree
class MlpParams:
    gate: Linear  # [R, F, D]
    up: Linear  # [R, F, D]
    down: Linear  # [R, D, F]


def swiglu(p: MlpParams, layer: Index, x: Float[Array, "B T D"], ops: Ops) -> Float[Array, "B T D"]:
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202, equation 6)."""
    return linear(p.down, layer, jax.nn.silu(linear(p.gate, layer, x, ops)) * linear(p.up, layer, x, ops), ops)
