"""The gated delta net of Qwen3-Next and Qwen3.5: a short convolution, then a linear attention with a state."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxinfer.layers.linear import Linear, linear, linears
from jaxinfer.layers.norm import rms_norm
from jaxinfer.ops import Ops
from jaxinfer.ops.matmul import Norm
from jaxinfer.quants import at
from jaxinfer.tree import Index, pytree


@pytree
class DeltaParams:
    """The weights, for C = 2*K*S + N*S channels. Without `alpha`, `beta` is both."""

    qkv: Linear  # [R, C, D]: q and k of K heads, v of N
    z: Linear  # [R, N*S, D]
    conv: Array  # [R, C, kernel]
    a: Array  # [R, N], the negative rates of decay
    dt_bias: Array  # [R, N]
    beta: Linear  # [R, N, D]; or [R, 2*N, D], for each key head N / K rows of beta and as many of alpha
    alpha: Linear | None  # [R, N, D]
    norm: Array  # [R, S]
    out: Linear  # [R, D, N*S]


@dataclass(frozen=True, kw_only=True)
class DeltaSpec:
    """What the delta layers of a model are. N value heads share K key heads: n takes n // (N / K), or else n % K."""

    key_heads: int
    value_heads: int
    width: int  # S, of every head
    kernel: int  # tokens that the convolution sees
    grouped: bool
    eps: float

    @property
    def keys(self) -> int:
        return self.key_heads * self.width

    @property
    def values(self) -> int:
        return self.value_heads * self.width

    def cache(self, repeats: int, batch: int, slots: int, chunk: int, dtype: DTypeLike) -> "DeltaState":
        """A state of its own size and type, however many tokens are to come."""
        return empty_state(repeats, batch, self)


@pytree
class DeltaState:
    """All that layers of a stack keep of the tokens so far; zeros before the first.

    It cannot be cut back to an earlier token: whoever may want to return to one must keep that state.
    """

    conv: Float[Array, "R B kernel-1 C"]  # f32, the last projections before the convolution
    state: Float[Array, "R B N S S"]  # f32, from keys to values


def empty_state(repeats: int, batch: int, spec: DeltaSpec) -> DeltaState:
    conv = jnp.zeros((repeats, batch, spec.kernel - 1, 2 * spec.keys + spec.values))
    return DeltaState(conv, jnp.zeros((repeats, batch, spec.value_heads, spec.width, spec.width)))


def delta(
    p: DeltaParams,
    layer: Index,
    x: Float[Array, "B T D"],
    pos: Int[Array, "B T"],
    cache: DeltaState,
    spec: DeltaSpec,
    ops: Ops,
    *,
    norm: Norm | None = None,
    residual: Float[Array, "B T D"] | None = None,
) -> tuple[Float[Array, "B T D"], DeltaState]:
    """A gated delta net (arXiv:2412.06464, figure 1): out(norm(rule(silu(conv(qkv x)))) * silu(z x)), plus a residual.

    x [B, T, D] in the activations' type, normed before if there is a norm; everything between the projections in f32.
    Positions below zero mark padding, at the start of a row only: it leaves the state as it was, also one that an
    earlier call has left. Returns (y [B, T, D], cache).
    """
    b, t, _ = x.shape
    real = (pos >= 0)[..., None]
    maps = [p.qkv, p.z, p.beta] if p.alpha is None else [p.qkv, p.z, p.beta, p.alpha]
    qkv, z, *gates = map(_f32, linears(maps, layer, x, ops, norm=norm))
    qkv = jnp.where(real, qkv, 0)  # whatever a pad is, infinite even
    mixed, tail = _convolve(qkv, _f32(p.conv[layer]), at(cache.conv, layer), (pos < 0).sum(1))
    q, k, v = jnp.split(jax.nn.silu(mixed), [spec.keys, 2 * spec.keys], axis=-1)
    q, k = (_unit(y.reshape(b, t, spec.key_heads, spec.width), spec.eps) for y in (q, k))
    alpha, beta = _gates(gates, spec)
    log_decay = _f32(p.a[layer]) * jax.nn.softplus(alpha + _f32(p.dt_bias[layer]))
    o, state = ops.delta(
        q * spec.width**-0.5,
        k,
        v.reshape(b, t, spec.value_heads, spec.width),
        jnp.where(real, log_decay, 0),  # neither decay nor correction: a pad changes nothing
        jnp.where(real, jax.nn.sigmoid(beta), 0),
        at(cache.state, layer),
        grouped=spec.grouped,
    )
    y = rms_norm(o, p.norm[layer], spec.eps) * jax.nn.silu(z.reshape(o.shape))
    cache = DeltaState(cache.conv.at[layer].set(tail), cache.state.at[layer].set(state))
    return linear(p.out, layer, y.reshape(b, t, -1).astype(x.dtype), ops, residual), cache


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _gates(products: list[Array], spec: DeltaSpec) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
    """alpha and beta of every value head, before their nonlinearities, from the products with `beta` and `alpha`."""
    beta, *alpha = products
    if alpha:
        return alpha[0], beta
    both = beta.reshape(*beta.shape[:2], spec.key_heads, 2, -1)
    beta, alpha = (both[..., i, :].reshape(*beta.shape[:2], spec.value_heads) for i in (0, 1))
    return alpha, beta


def _convolve(
    x: Float[Array, "B T C"],
    weight: Float[Array, "C kernel"],
    tail: Float[Array, "B kernel-1 C"],
    pads: Int[Array, " B"],
) -> tuple[Float[Array, "B T C"], Float[Array, "B kernel-1 C"]]:
    """Each channel's causal convolution; weight[:, -1] meets the token itself. Returns (y, the new tail).

    The tail is put between a row's padding and its first token, so that neither it nor the new tail sees any.
    """
    t, kernel = x.shape[1], weight.shape[1]
    put = jax.vmap(lambda row, tail, start: lax.dynamic_update_slice(row, tail, (start, 0)))
    x = put(jnp.pad(x, ((0, 0), (kernel - 1, 0), (0, 0))), tail, pads)
    y = x[:, :t] * weight[:, 0]
    for j in range(1, kernel):
        y += x[:, j : j + t] * weight[:, j]
    return y, x[:, t:]


def _unit(x: Float[Array, "*batch S"], eps: float) -> Float[Array, "*batch S"]:
    return x * lax.rsqrt((x * x).sum(-1, keepdims=True) + eps)
