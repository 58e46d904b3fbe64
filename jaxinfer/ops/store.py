"""From the products with q, k and v to attention: norms of heads, rotation, and the cache."""

from typing import Any

from jaxtyping import Array, Float, Int

from jaxinfer.cache import KVCache, write
from jaxinfer.layers.norm import rms_norm
from jaxinfer.layers.rope import Rope, rope
from jaxinfer.ops.form import form
from jaxinfer.pallas.store import FEW, beyond, store
from jaxinfer.tree import Index


@form("step by step")
def store_reference(
    q: Float[Array, "B T NH"],
    k: Float[Array, "B T KH"] | None,
    v: Float[Array, "B T KH"] | None,
    cache: KVCache,
    layer: Index,
    pos: Int[Array, "B T"],
    *,
    rotation: Rope | None,
    eps: float,
    q_norm: Float[Array, "R n"] | None = None,
    k_norm: Float[Array, "R m"] | None = None,
    norm_values: bool = False,
    norm_rotated: bool = False,
) -> tuple[Float[Array, "B T K G H"], KVCache]:
    """Queries as attention takes them, and the cache with this call's keys and values at their slots of one layer.

    q and k are normed, each head or all heads together as the weight is wide, then rotated, then each head is normed
    without a weight where they are `norm_rotated`. Without `v` the values are the raw keys; where `norm_values`, each
    head of them is normed without a weight. Without `k` nothing is stored. Norms and rotation in f32, each rounded to
    the activations' type. Padding (pos < 0) is not stored. A call's positions must be distinct modulo S within a row.
    """
    b, t, _ = q.shape
    kv_heads, width = cache.k.shape[2], cache.k.shape[4]

    def heads(y: Array, norm: Array | None) -> Array:
        if norm is not None:
            y = rms_norm(y.reshape(b, t, -1, norm.shape[-1]), norm[layer], eps)
        return y.reshape(b, t, -1, width)

    def turned(y: Array) -> Array:
        y = y if rotation is None else rope(y, pos, rotation)
        return rms_norm(y, None, eps) if norm_rotated else y

    q = turned(heads(q, q_norm)).reshape(b, t, kv_heads, -1, width)
    if k is None:
        return q, cache
    v = heads(k if v is None else v, None)
    v = rms_norm(v, None, eps) if norm_values else v
    return q, write(cache, layer, turned(heads(k, k_norm)), v, pos)


def store_ampere(
    q: Float[Array, "B T NH"],
    k: Float[Array, "B T KH"] | None,
    v: Float[Array, "B T KH"] | None,
    cache: KVCache,
    layer: Index,
    pos: Int[Array, "B T"],
    *,
    rotation: Rope | None,
    q_norm: Float[Array, "R n"] | None = None,
    k_norm: Float[Array, "R m"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T K G H"], KVCache]:
    """The reference's, for few tokens in one kernel for sm_80 and later, where it covers them, see `beyond`."""
    args, norms = (q, k, v, cache, layer, pos), {"q_norm": q_norm, "k_norm": k_norm}
    if q.shape[1] > FEW:
        return store_reference(*args, rotation=rotation, **norms, **options)
    if why := beyond(q, cache, rotation, (q_norm, k_norm)):
        with form("step by step", why):
            return store_reference(*args, rotation=rotation, **norms, **options)
    with form("one kernel"):
        return store(*args, rotation=rotation, **norms, **options)
