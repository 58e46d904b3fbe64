"""Attention over a cache."""

from functools import partial

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
) -> Float[Array, "B T K G H"]:
    """softmax(scale * q k^T) v over the cached positions p that a query at `pos` sees: pos - window < p <= pos.

    Operands in q's type, scores and softmax in f32. A query that sees nothing, such as a pad, gives zeros.
    """
    b, t, kv_heads, group, width = q.shape
    k, v, held = (at(a, layer) for a in (cache.k, cache.v, cache.pos))
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    rows = q.transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, group * t, width)
    s = dot("bkqh,bksh->bkqs", rows, k.astype(q.dtype)).reshape(b, kv_heads, group, t, -1) * scale
    s = jnp.where(visible(pos, held, window)[:, :, None], s, -jnp.inf)
    top = jnp.maximum(s.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)  # finite, so that no row is nan
    e = jnp.exp(s - top)
    total = jnp.maximum(e.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    o = dot("bkqs,bksh->bkqh", e.astype(q.dtype).reshape(b, kv_heads, group * t, -1), v.astype(q.dtype))
    return (o.reshape(b, kv_heads, group, t, width) / total).transpose(0, 3, 1, 2, 4).astype(q.dtype)


def visible(pos: Int[Array, "B T"], held: Int[Array, "B P S"], window: int | None) -> Bool[Array, "B P T S"]:
    """Which cached positions a query sees: those of tokens, up to its own, within the window."""
    age = pos[:, None, :, None] - held[:, :, None, :]
    seen = (held[:, :, None, :] >= 0) & (age >= 0)
    return seen if window is None else seen & (age < window)


TILE, BLOCK = 128, 256  # queries and keys at a time on a CPU: fastest of 64 to 512 for heads of 64, caches of 768


def attention_blocks(
    q: Float[Array, "B T K G H"],
    cache: KVCache,
    layer: Index,
    pos: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "B T K G H"]:
    """The reference's attention, a tile of queries and a block of keys at a time (FlashAttention, arXiv:2205.14135).

    Blocks in which no query of the tile sees a key are not visited, so that the cost follows the tokens in the cache,
    or in the window, and not the slots. The stack is read in place.
    """
    b, t, *heads = q.shape
    tiles = -(-t // TILE) if t > TILE else 1
    width = TILE if t > TILE else t
    pad = ((0, 0), (0, tiles * width - t))
    q_tiles = jnp.pad(q, (*pad, (0, 0), (0, 0), (0, 0))).reshape(b, tiles, width, *heads).swapaxes(0, 1)
    pos_tiles = jnp.pad(pos, pad, constant_values=-1).reshape(b, tiles, width).swapaxes(0, 1)
    one = partial(_attend_tile, cache=cache, layer=layer, scale=scale, window=window)
    o = one(q_tiles[0], pos_tiles[0])[None] if tiles == 1 else lax.map(lambda x: one(*x), (q_tiles, pos_tiles))
    return o.swapaxes(0, 1).reshape(b, tiles * width, *heads)[:, :t]


def _attend_tile(
    q: Array, pos: Array, *, cache: KVCache, layer: Index, scale: float, window: int | None
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
        s = jnp.where(visible(pos, held, window)[:, :, None], s, -jnp.inf)
        new = jnp.maximum(top, s.max(-1, keepdims=True))
        e, decay = jnp.exp(s - new), jnp.exp(top - new)
        values = dot(
            "bkqs,bksh->bkqh", e.reshape(b, kv_heads, group * t, block).astype(q.dtype), read(cache.v).astype(q.dtype)
        )
        return new, total * decay + e.sum(-1, keepdims=True), o * decay + values.reshape(o.shape)

    shape = (b, kv_heads, group, t)
    empty = jnp.full((*shape, 1), jnp.finfo(jnp.float32).min), jnp.zeros((*shape, 1)), jnp.zeros((*shape, width))
    _, total, o = lax.fori_loop(0, count, visit, empty)
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
) -> Float[Array, "B T K G H"]:
    """The reference's attention through cuDNN's fused kernel, for chunks; few queries take the reference.

    A first chunk, whose keys are all its own, is plain causal attention; a later one needs the mask as a bias, and
    visits every slot. Operands must be bf16 or f16, see `default_ops`; heads that cuDNN does not know, wider
    than 256 or no multiple of 8, take the reference. A row's tokens must be consecutive and end the chunk, as
    `left_pad` lays them.
    """
    b, t, kv_heads, group, width = q.shape
    if t <= FEW or width > 256 or width % 8:
        return attention_reference(q, cache, layer, pos, scale=scale, window=window)
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

    alone = (pos[:, -1] < t).all() if cache.k.shape[3] >= t and (window is None or window >= t) else False
    return lax.cond(alone, first, later, None).reshape(q.shape)
