"""Grouped-query attention over a cache."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxinfer import cache as caches
from jaxinfer.cache import KVCache
from jaxinfer.layers.linear import Linear, linear, linears
from jaxinfer.layers.rope import Rope
from jaxinfer.ops import Ops
from jaxinfer.ops.matmul import Norm
from jaxinfer.tree import Index, pytree


@pytree
class AttentionParams:
    """Projections, optional norms of q and k before the rotation, and optional sinks.

    A norm of width H is one of each head, a wider one of all heads together. Without `v` the values are the raw keys;
    without `k` the layer has no keys of its own and attends to another layer's cache.
    """

    q: Linear  # [R, K*G*H, D]; twice the rows where the output is gated
    k: Linear | None  # [R, K*H, D]
    v: Linear | None  # [R, K*H, D]
    o: Linear  # [R, D, K*G*H]
    q_norm: Array | None = None  # [R, H] or [R, K*G*H]
    k_norm: Array | None = None  # [R, H] or [R, K*H]
    sinks: Array | None = None  # [R, K*G]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one kind of attention layer is; the same for all layers of that kind."""

    kv_heads: int
    group: int
    width: int
    scale: float
    eps: float
    rope: Rope | None  # None: no rotation
    window: int | None = None
    aligned: bool = False  # windows begin at multiples of their length, and do not slide
    gated: bool = False  # each head of q is followed by a gate of its output
    norm_values: bool = False  # heads of v are normed, without a weight
    norm_rotated: bool = False  # heads of q and k are normed after the rotation, without a weight
    warm_up: tuple[float, int] | None = None  # (a, n): q of position p is scaled by 1 + a ln(floor((p + 1) / n) + 1)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def cache(self, repeats: int, batch: int, slots: int, chunk: int, dtype: DTypeLike) -> KVCache:
        return caches.empty(repeats, batch, self.kv_heads, slots, self.width, dtype, window=self.window, chunk=chunk)


def attention(
    p: AttentionParams,
    layer: Index,
    x: Float[Array, "B T D"],
    pos: Int[Array, "B T"],
    cache: KVCache,
    spec: AttentionSpec,
    ops: Ops,
    *,
    norm: Norm | None = None,
    residual: Float[Array, "B T D"] | None = None,
    source: Index | None = None,
    reader: Index | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Grouped-query attention (arXiv:2305.13245): writes this call's keys and values, then attends to the cache.

    x [B, T, D] in the activations' type, softmax in f32. Positions below zero mark padding: nothing is stored for
    them and nothing attends to them. A layer without keys of its own attends to those of layer `source` of the cache,
    and where the cache keeps recent queries it is its `reader`. Returns (y [B, T, D], cache).
    """
    b, t, _ = x.shape

    maps = [y for y in (p.q, p.k, p.v) if y is not None]
    q, *rest = linears(maps, layer, x, ops, norm=norm)
    k, v = [*rest, None, None][:2]
    gate = None
    if spec.gated:
        q, gate = jnp.split(q.reshape(b, t, spec.heads, 2 * spec.width), 2, axis=-1)
        q = q.reshape(b, t, -1)
    q, cache = ops.store(
        q,
        k,
        v,
        cache,
        layer,
        pos,
        rotation=spec.rope,
        eps=spec.eps,
        q_norm=p.q_norm,
        k_norm=p.k_norm,
        norm_values=spec.norm_values,
        norm_rotated=spec.norm_rotated,
    )
    if k is not None:
        source, reader = layer, layer
    assert source is not None
    if spec.warm_up is not None:
        rate, length = spec.warm_up
        steps = jnp.floor((pos + 1).astype(jnp.float32) / length)
        q = (q.astype(jnp.float32) * (1 + rate * jnp.log(steps + 1))[..., None, None, None]).astype(q.dtype)
    if cache.recent_q is not None:
        assert reader is not None
        cache = caches.capture(cache, reader, q.astype(jnp.float32) * spec.scale, pos)
    o = ops.attention(
        q,
        cache,
        source,
        pos,
        scale=spec.scale,
        window=spec.window,
        aligned=spec.aligned,
        sinks=None if p.sinks is None else p.sinks[layer],
    ).reshape(b, t, -1)
    if gate is not None:
        o = o * jax.nn.sigmoid(gate.reshape(o.shape).astype(jnp.float32)).astype(o.dtype)
    return linear(p.o, layer, o, ops, residual), cache
