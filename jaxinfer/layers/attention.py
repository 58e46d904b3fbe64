"""Grouped-query attention over a cache."""

from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from jaxinfer.cache import KVCache, write
from jaxinfer.layers.linear import Linear, linear
from jaxinfer.layers.norm import rms_norm
from jaxinfer.layers.rope import Rope, rope
from jaxinfer.ops import Ops
from jaxinfer.tree import Index, pytree


@pytree
class AttentionParams:
    """Projections, and optional norms over each head of q and k before the rotation."""

    q: Linear  # [R, K*G*H, D]
    k: Linear  # [R, K*H, D]
    v: Linear  # [R, K*H, D]
    o: Linear  # [R, D, K*G*H]
    q_norm: Array | None = None  # [R, H]
    k_norm: Array | None = None  # [R, H]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one kind of attention layer is; the same for all layers of that kind."""

    kv_heads: int
    group: int
    width: int
    scale: float
    rope: Rope
    eps: float
    window: int | None = None

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


def attention(
    p: AttentionParams,
    layer: Index,
    x: Float[Array, "B T D"],
    pos: Int[Array, "B T"],
    cache: KVCache,
    spec: AttentionSpec,
    ops: Ops,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Grouped-query attention (arXiv:2305.13245): writes this call's keys and values, then attends to the cache.

    x [B, T, D] in the activations' type, softmax in f32. Positions below zero mark padding: nothing is stored for
    them and nothing attends to them. Returns (y [B, T, D], cache).
    """
    b, t, _ = x.shape
    q = linear(p.q, layer, x, ops).reshape(b, t, spec.kv_heads, spec.group, spec.width)
    k = linear(p.k, layer, x, ops).reshape(b, t, spec.kv_heads, spec.width)
    v = linear(p.v, layer, x, ops).reshape(b, t, spec.kv_heads, spec.width)
    if p.q_norm is not None:
        q = rms_norm(q, p.q_norm[layer], spec.eps)
    if p.k_norm is not None:
        k = rms_norm(k, p.k_norm[layer], spec.eps)
    cache = write(cache, layer, rope(k, pos, spec.rope), v, pos)
    o = ops.attention(rope(q, pos, spec.rope), cache, layer, pos, scale=spec.scale, window=spec.window)
    return linear(p.o, layer, o.reshape(b, t, -1), ops), cache
