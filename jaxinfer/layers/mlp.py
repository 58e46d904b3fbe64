"""The gated feed-forward layer, and the activations of published ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.layers.linear import Linear, linear, linears
from jaxinfer.ops import Ops
from jaxinfer.ops.experts import Activation
from jaxinfer.ops.matmul import Norm
from jaxinfer.tree import Index, pytree


@pytree
class MlpParams:
    gate: Linear  # [R, F, D]
    up: Linear  # [R, F, D]
    down: Linear  # [R, D, F]


def mlp(
    p: MlpParams,
    layer: Index,
    x: Float[Array, "B T D"],
    activation: Activation,
    ops: Ops,
    *,
    norm: Norm | None = None,
    residual: Float[Array, "B T D"] | None = None,
) -> Float[Array, "B T D"]:
    """down(activation(gate(x), up(x))) (arXiv:2002.05202, equation 6), x normed before; plus a residual."""
    (y,) = linears((p.gate, p.up), layer, x, ops, norm=norm, combine=activation)
    return linear(p.down, layer, y, ops, residual)


# Each takes a gate and what it gates, and computes in f32.


def silu_gate(gate: Float[Array, "*n F"], up: Float[Array, "*n F"]) -> Float[Array, "*n F"]:
    """silu(gate) * up: SwiGLU."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def gelu_gate(gate: Float[Array, "*n F"], up: Float[Array, "*n F"]) -> Float[Array, "*n F"]:
    """gelu(gate) * up with the tanh form of gelu (arXiv:1606.08415, section 2): GeGLU of Gemma."""
    return (jax.nn.gelu(gate.astype(jnp.float32), approximate=True) * up.astype(jnp.float32)).astype(gate.dtype)


def clamped_gate(gate: Float[Array, "*n F"], up: Float[Array, "*n F"]) -> Float[Array, "*n F"]:
    """g sigmoid(1.702 g) * (u + 1) with g = min(gate, 7) and u = up within -7 and 7: that of gpt-oss."""
    g, u = jnp.minimum(gate.astype(jnp.float32), 7), jnp.clip(up.astype(jnp.float32), -7, 7)
    return (g * jax.nn.sigmoid(1.702 * g) * (u + 1)).astype(gate.dtype)
