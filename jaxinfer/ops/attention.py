"""Attention over a cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.cache import KVCache
from jaxinfer.ops.form import form
from jaxinfer.pallas.bounds import beyond
from jaxinfer.pallas.flash import flash_attention
from jaxinfer.pallas.flash_mma import FEW, attention_mma
from jaxinfer.quants import at
from jaxinfer.tree import Index

TILE, BLOCK = 128, 256  # queries and keys at a time on a CPU: fastest of 64 to 512 for heads of 64, caches of 768
FAR = jnp.iinfo(jnp.int32).max  # a position that no query sees


@form("key by key, in the order of positions")
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
    softcap: float | None = None,
    skip: bool = True,
) -> Float[Array, "B T K G H"]:
    """softmax(scale * q k^T) v over the cached positions p that a query at `pos` sees: pos - window < p <= pos.

    Where windows are `aligned`, it sees those from the last multiple of `window` on. A head's sink is the score of a
    key without a value. A `softcap` c makes c tanh(s / c) of scores s. All in f32, the result in q's type. A query that
    sees nothing, such as a pad, gives zeros.

    The softmax is that of arXiv:2307.08691, section 3.1, with blocks of one key, in the order of positions. A key that
    a query does not see has the weight exp(-inf) = 0 and leaves the rest times exp(0) = 1: it changes no bit. So the
    bits depend on what a query sees, and not on which slots hold it, on what lies between, on other rows, or on `skip`:
    without it all slots are visited, and not only those that a query of the tile may see.
    """

    def tile(q: Float[Array, "B T K G H"], pos: Int[Array, "B T"]) -> Float[Array, "B T K G H"]:
        b, t, kv_heads, group, width = q.shape
        order, held, first, count = live_keys(pos, at(cache.pos, layer), window, aligned)
        if not skip:
            first, count = jnp.zeros_like(first), jnp.full_like(count, held.shape[2])
        row, head = jnp.arange(b)[:, None], jnp.arange(kv_heads)
        queries = jnp.tile(pos, (1, group))  # [B, Q] for Q = G * T; the last axis also of what follows: 3 times as fast
        rows = (q.astype(jnp.float32) * scale).transpose(0, 2, 4, 3, 1).reshape(b, kv_heads, width, group * t)

        def visit(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, o = carry
            n = (first + i)[..., None]
            key = jnp.take_along_axis(held, n, axis=2, mode="fill", fill_value=FAR)  # [B, P, 1]
            slot = jnp.take_along_axis(order, n, axis=2, mode="clip")[..., 0]
            where = layer, row, head, jnp.broadcast_to(slot, (b, kv_heads))
            k, v = (a.at[where].get(mode="promise_in_bounds").astype(jnp.float32) for a in (cache.k, cache.v))
            s = jnp.einsum("bkhq,bkh->bkq", rows, k, precision=lax.Precision.HIGHEST)
            s = jnp.where(visible(queries, key, window, aligned)[..., 0], _capped(s, softcap), -jnp.inf)
            new = jnp.maximum(top, s)
            e, decay = jnp.exp(s - new), jnp.exp(top - new)
            return new, total * decay + e, o * decay[:, :, None] + e[:, :, None] * v[..., None]

        start = (x.reshape(b, kv_heads, group * t) for x in _start(sinks, (b, kv_heads, group, t)))
        _, total, o = lax.fori_loop(0, count.max(), visit, (*start, jnp.zeros_like(rows)))
        o = (o / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[:, :, None]).astype(q.dtype)
        return o.reshape(b, kv_heads, width, group, t).transpose(0, 4, 1, 3, 2)

    return _by_tiles(tile, q, pos, TILE)


def live_keys(
    pos: Int[Array, "B T"], held: Int[Array, "B P S"], window: int | None, aligned: bool = False
) -> tuple[Int[Array, "B P S"], Int[Array, "B P S"], Int[Array, "B P"], Int[Array, "B P"]]:
    """Slots in the order of the positions that they hold, empty ones last, and those positions, FAR for the empty.

    Then which of them is the first that a query of the row may see, and how many there are to the last; none: <= 0.
    """
    held = jnp.where(held < 0, FAR, held)
    order = jnp.argsort(held, axis=2)
    held = jnp.take_along_axis(held, order, axis=2)
    oldest = 0
    if window is not None:
        query = jnp.where(pos < 0, FAR, pos).min(1)[:, None, None]
        oldest = query // window * window if aligned else query - window + 1
    first = (held < oldest).sum(2)
    return order, held, first, (held <= pos.max(1)[:, None, None]).sum(2) - first


def visible(
    pos: Int[Array, "B T"], held: Int[Array, "B P S"], window: int | None, aligned: bool = False
) -> Bool[Array, "B P T S"]:
    """Which cached positions a query sees: those of tokens, up to its own, within the window."""
    query, key = pos[:, None, :, None], held[:, :, None, :]
    seen = (key >= 0) & (key <= query)
    if window is None:
        return seen
    return seen & (key >= query // window * window if aligned else key > query - window)


def _capped(s: Array, softcap: float | None) -> Array:
    return s if softcap is None else softcap * jnp.tanh(s / softcap)


def _start(sinks: Array | None, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The softmax's maximum and sum before any key [B, K, G, T, 1]; finite, so that no row is nan."""
    if sinks is None:
        return jnp.full((*shape, 1), jnp.finfo(jnp.float32).min), jnp.zeros((*shape, 1))
    tops = sinks.astype(jnp.float32).reshape(1, *shape[1:3], 1, 1)
    return jnp.broadcast_to(tops, (*shape, 1)), jnp.ones((*shape, 1))


@form("all slots at once")
def attention_dense(
    q: Float[Array, "B T K G H"],
    cache: KVCache,
    layer: Index,
    pos: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    aligned: bool = False,
    sinks: Float[Array, " N"] | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T K G H"]:
    """The reference's attention as two products over all slots. Operands in q's type, scores and softmax in f32."""
    b, t, kv_heads, group, width = q.shape
    k, v, held = (at(a, layer) for a in (cache.k, cache.v, cache.pos))
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    dot = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    rows = q.transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, group * t, width)
    s = dot("bkqh,bksh->bkqs", rows, k.astype(q.dtype)).reshape(b, kv_heads, group, t, -1) * scale
    s = jnp.where(visible(pos, held, window, aligned)[:, :, None], _capped(s, softcap), -jnp.inf)
    first, total = _start(sinks, (b, kv_heads, group, t))
    top = jnp.maximum(s.max(-1, keepdims=True), first)
    e = jnp.exp(s - top)
    total = jnp.maximum(e.sum(-1, keepdims=True) + total * jnp.exp(first - top), jnp.finfo(jnp.float32).tiny)
    o = dot("bkqs,bksh->bkqh", e.astype(q.dtype).reshape(b, kv_heads, group * t, -1), v.astype(q.dtype))
    return (o.reshape(b, kv_heads, group, t, width) / total).transpose(0, 3, 1, 2, 4).astype(q.dtype)


@form(f"blocks of {BLOCK} keys")
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
    softcap: float | None = None,
    skip: bool = True,
) -> Float[Array, "B T K G H"]:
    """The reference's attention, a tile of queries and a block of keys at a time (FlashAttention, arXiv:2205.14135).

    Blocks in which no query of the tile sees a key are not visited, so that the cost follows the tokens in the cache,
    or in the window, and not the slots. Without `skip` they are, which changes no bit. The stack is read in place.
    """
    options = {"scale": scale, "window": window, "aligned": aligned, "sinks": sinks, "softcap": softcap, "skip": skip}
    return _by_tiles(partial(_attend_tile, cache=cache, layer=layer, **options), q, pos, TILE)


@form("all slots at once, for 128 queries at a time")
def attention_tiles(
    q: Float[Array, "B T K G H"], cache: KVCache, layer: Index, pos: Int[Array, "B T"], **options: Any
) -> Float[Array, "B T K G H"]:
    """All slots a tile of queries at a time, so that no more than a tile's scores are ever there."""
    return _by_tiles(lambda q, pos: attention_dense(q, cache, layer, pos, **options), q, pos, TILE)


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
    softcap: float | None,
    skip: bool,
) -> Float[Array, "B T K G H"]:
    b, t, kv_heads, group, width = q.shape
    slots = cache.k.shape[3]
    block = min(BLOCK, slots)
    order, count = live_blocks(pos, at(cache.pos, layer), block, window)
    order, count = (order, count) if skip else (jnp.arange(len(order)), len(order))
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
        s = jnp.where(visible(pos, held, window, aligned)[:, :, None], _capped(s, softcap), -jnp.inf)
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


def attention_hopper(
    q: Float[Array, "B T K G H"], cache: KVCache, layer: Index, pos: Int[Array, "B T"], **options: Any
) -> Float[Array, "B T K G H"]:
    """The reference's attention through kernels for sm_90; all slots at once where they do not attend, see `beyond`.

    Positions of a row ascend, padding first, as `left_pad` lays them.
    """
    if not beyond(cache, q.dtype) and q.shape[1] > FEW:
        with form("flash attention, warpgroups in turns"):
            return flash_attention(q, cache, layer, pos, **options)
    return attention_ampere(q, cache, layer, pos, hopper=True, **options)


def attention_ampere(
    q: Float[Array, "B T K G H"],
    cache: KVCache,
    layer: Index,
    pos: Int[Array, "B T"],
    *,
    hopper: bool = False,
    **options: Any,
) -> Float[Array, "B T K G H"]:
    """As `attention_hopper`, for sm_80 and later: one kernel for all calls. Pipelines differ on sm_90, `hopper`."""
    if why := beyond(cache, q.dtype):
        with form("all slots at once", why):
            return attention_tiles(q, cache, layer, pos, **options)
    with form("flash attention, keys in parts" if q.shape[1] <= FEW else "flash attention"):
        return attention_mma(q, cache, layer, pos, hopper=hopper, **options)
