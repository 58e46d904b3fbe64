"""Attention over a cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.cache import KVCache
from jaxinfer.ops.matmul import FEW
from jaxinfer.quants import at
from jaxinfer.tree import Index


def attention_reference(
    q: Float[Array, "B T K G H"],
    cache: KVCache,
    layer: Index,
    pos: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    aligned: bool = False,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T K G H"]:
    """softmax(scale * q k^T) v over the cached positions p that a query at `pos` sees: pos - window < p <= pos.

    Where windows are `aligned`, it sees those from the last multiple of `window` on. A head's sink is the score of a
    key without a value. Operands in q's type, scores and softmax in f32. A query that sees nothing, such as a pad,
    gives zeros.
    """
    b, t, kv_heads, group, width = q.shape
    k, v, held = (at(a, layer) for a in (cache.k, cache.v, cache.pos))
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    rows = q.transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, group * t, width)
    s = dot("bkqh,bksh->bkqs", rows, k.astype(q.dtype)).reshape(b, kv_heads, group, t, -1) * scale
    s = jnp.where(visible(pos, held, window, aligned)[:, :, None], s, -jnp.inf)
    first, total = _start(sinks, (b, kv_heads, group, t))
    top = jnp.maximum(s.max(-1, keepdims=True), first)
    e = jnp.exp(s - top)
    total = jnp.maximum(e.sum(-1, keepdims=True) + total * jnp.exp(first - top), jnp.finfo(jnp.float32).tiny)
    o = dot("bkqs,bksh->bkqh", e.astype(q.dtype).reshape(b, kv_heads, group * t, -1), v.astype(q.dtype))
    return (o.reshape(b, kv_heads, group, t, width) / total).transpose(0, 3, 1, 2, 4).astype(q.dtype)


def visible(
    pos: Int[Array, "B T"], held: Int[Array, "B P S"], window: int | None, aligned: bool = False
) -> Bool[Array, "B P T S"]:
    """Which cached positions a query sees: those of tokens, up to its own, within the window."""
    query, key = pos[:, None, :, None], held[:, :, None, :]
    seen = (key >= 0) & (key <= query)
    if window is None:
        return seen
    return seen & (key >= query // window * window if aligned else key > query - window)


def _start(sinks: Array | None, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The softmax's maximum and sum before any key [B, K, G, T, 1]; finite, so that no row is nan."""
    if sinks is None:
        return jnp.full((*shape, 1), jnp.finfo(jnp.float32).min), jnp.zeros((*shape, 1))
    tops = sinks.astype(jnp.float32).reshape(1, *shape[1:3], 1, 1)
    return jnp.broadcast_to(tops, (*shape, 1)), jnp.ones((*shape, 1))


TILE, BLOCK = 128, 256  # queries and keys at a time on a CPU: fastest of 64 to 512 for heads of 64, caches of 768


def attention_blocks(
    q: Float[Array, "B T K G H"],
    cache: KVCache,
    layer: Index,
    pos: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    aligned: bool = False,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T K G H"]:
    """The reference's attention, a tile of queries and a block of keys at a time (FlashAttention, arXiv:2205.14135).

    Blocks in which no query of the tile sees a key are not visited, so that the cost follows the tokens in the cache,
    or in the window, and not the slots. The stack is read in place.
    """
    one = partial(_attend_tile, cache=cache, layer=layer, scale=scale, window=window, aligned=aligned, sinks=sinks)
    return _by_tiles(one, q, pos, TILE)


def attention_tiles(
    q: Float[Array, "B T K G H"], cache: KVCache, layer: Index, pos: Int[Array, "B T"], **options: Any
) -> Float[Array, "B T K G H"]:
    """The reference a tile of queries at a time, so that no more than a tile's scores are ever there."""
    return _by_tiles(lambda q, pos: attention_reference(q, cache, layer, pos, **options), q, pos, TILE)


def _by_tiles(
    attend: Callable[[Array, Array], Array], q: Float[Array, "B T K G H"], pos: Int[Array, "B T"], width: int
) -> Float[Array, "B T K G H"]:
    b, t, *heads = q.shape
    if t <= width:
        return attend(q, pos)
    tiles = -(-t // width)
    pad = ((0, 0), (0, tiles * width - t))
    q_tiles = jnp.pad(q, (*pad, (0, 0), (0, 0), (0, 0))).reshape(b, tiles, width, *heads).swapaxes(0, 1)
    pos_tiles = jnp.pad(pos, pad, constant_values=-1).reshape(b, tiles, width).swapaxes(0, 1)
    o = lax.map(lambda x: attend(*x), (q_tiles, pos_tiles))
    return o.swapaxes(0, 1).reshape(b, tiles * width, *heads)[:, :t]


def _attend_tile(
    q: Array,
    pos: Array,
    *,
    cache: KVCache,
    layer: Index,
    scale: float,
    window: int | None,
    aligned: bool,
    sinks: Array | None,
) -> Float[Array, "B T K G H"]:
    b, t, kv_heads, group, width = q.shape
    slots = cache.k.shape[3]
    block = min(BLOCK, slots)
    order, count = live_blocks(pos, at(cache.pos, layer), block, window)
    dot = partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    rows = (q * scale).transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, group * t, width)

    def visit(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, o = carry
        first = order[i] * block
        start = jnp.minimum(first, slots - block)  # the last block may overlap the one before: those keys are masked

        def read(a: Array) -> Array:
            return lax.dynamic_slice(
                a, (layer, 0, 0, start, *(0,) * (a.ndim - 4)), (1, *a.shape[1:3], block, *a.shape[4:])
            )[0]

        held = jnp.where(start + jnp.arange(block) >= first, read(cache.pos), -1)
        s = dot("bkqh,bksh->bkqs", rows, read(cache.k).astype(q.dtype)).reshape(b, kv_heads, group, t, block)
        s = jnp.where(visible(pos, held, window, aligned)[:, :, None], s, -jnp.inf)
        new = jnp.maximum(top, s.max(-1, keepdims=True))
        e, decay = jnp.exp(s - new), jnp.exp(top - new)
        values = dot(
            "bkqs,bksh->bkqh", e.reshape(b, kv_heads, group * t, block).astype(q.dtype), read(cache.v).astype(q.dtype)
        )
        return new, total * decay + e.sum(-1, keepdims=True), o * decay + values.reshape(o.shape)

    shape = (b, kv_heads, group, t)
    _, total, o = lax.fori_loop(0, count, visit, (*_start(sinks, shape), jnp.zeros((*shape, width))))
    return (o / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).transpose(0, 3, 1, 2, 4).astype(q.dtype)


def live_blocks(
    pos: Int[Array, "B T"], held: Int[Array, "B P S"], block: int, window: int | None
) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """Blocks of slots that hold a position which some query may see, in order, before the others; and how many."""
    far = jnp.iinfo(jnp.int32).max
    n = -(-held.shape[2] // block)
    padded = jnp.pad(held, ((0, 0), (0, 0), (0, n * block - held.shape[2])), constant_values=-1)
    blocks = padded.reshape(*held.shape[:2], n, block)
    newest, oldest = blocks.max((0, 1, 3)), jnp.where(blocks < 0, far, blocks).min((0, 1, 3))
    live = (newest >= 0) & (oldest <= pos.max())
    if window is not None:
        live &= newest > jnp.where(pos < 0, far, pos).min() - window
    return jnp.argsort(~live, stable=True), live.sum()


def attention_cudnn(
    q: Float[Array, "B T K G H"],
    cache: KVCache,
    layer: Index,
    pos: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    aligned: bool = False,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T K G H"]:
    """The reference's attention through cuDNN's fused kernel, for chunks; few queries take the reference.

    A first chunk, whose keys are all its own, is plain causal attention; a later one needs the mask as a bias, and
    visits every slot. Operands must be bf16 or f16, see `default_ops`; what cuDNN does not know takes the
    reference, a tile at a time: heads wider than 256 or no multiple of 8, sinks, aligned windows. A row's tokens must
    be consecutive and end the chunk, as `left_pad` lays them.
    """
    b, t, kv_heads, group, width = q.shape
    if t <= FEW or width > 256 or width % 8 or aligned or sinks is not None:
        return attention_tiles(q, cache, layer, pos, scale=scale, window=window, aligned=aligned, sinks=sinks)
    heads = q.reshape(b, t, kv_heads * group, width)
    attend = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")

    def first(_: None) -> Array:
        pads = t - 1 - pos[:, -1:]  # rolled to the end, where causality hides them: then slot, position and row agree
        order = (jnp.arange(t) + pads) % t
        back = (jnp.arange(t) - pads) % t
        own = [swapped(a)[:, :t] for a in (cache.k, cache.v)]
        return take_rows(attend(take_rows(heads, order), *own, is_causal=True), back)

    def later(_: None) -> Array:
        bias = jnp.where(visible(pos, at(cache.pos, layer), window), 0.0, -jnp.inf).astype(q.dtype)
        if bias.shape[1] > 1:
            bias = jnp.repeat(bias, group, axis=1)
        return attend(heads, swapped(cache.k), swapped(cache.v), bias=bias)

    def swapped(stack: Array) -> Array:
        # cuDNN wants [B, S, K, H]. Without the constraint XLA gives the whole stack that order, and copies it to do so.
        return with_layout_constraint(at(stack, layer), Layout((0, 1, 2, 3))).swapaxes(1, 2)

    def take_rows(x: Array, rows: Array) -> Array:
        return jnp.take_along_axis(x, rows[:, :, None, None], axis=1)

    whole = cache.shift is None and cache.k.shape[3] >= t and (window is None or window >= t)  # slots are positions
    alone = (pos[:, -1] < t).all() if whole else False
    return lax.cond(alone, first, later, None).reshape(q.shape)
