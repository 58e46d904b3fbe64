"""Caches as values: positions are stored beside what they belong to, so that masks never depend on slot order."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxinfer.tree import Index, pytree, static

BLOCK = 128  # a ring's slots are a multiple of this


@pytree
class KVCache:
    """Keys and values of a stack of layers.

    Position p of a row lives in slot (p - shift) % S: a full cache is a ring that never wraps. A slot whose `pos` is
    negative is empty. Positions are the same for all heads (P = 1), or each head has its own (P = K), as eviction may
    leave them. It also leaves the `shift` that puts the next token behind those kept; None is 0. Kept positions need
    not lie where it says: from then on only later ones may be written.
    """

    k: Float[Array, "R B K S H"]
    v: Float[Array, "R B K S H"]
    pos: Int[Array, "R B P S"]
    chunk: int | None = static(default=None)  # most tokens of a call, where the cache was made for a window
    shift: Int[Array, " B"] | None = None
    # The queries of the last W tokens, f32, rotated and times the layer's scale, so that q.k is a logit; zeros before
    # the first token. Q is R, or more where later layers read the last one's keys: theirs follow.
    recent_q: Float[Array, "Q B W K G H"] | None = None


def empty(
    repeats: int,
    batch: int,
    kv_heads: int,
    slots: int,
    width: int,
    dtype: DTypeLike,
    *,
    window: int | None = None,
    chunk: int | None = None,
) -> KVCache:
    """A cache that holds nothing. k and v are buffers of their own, so that both can be donated.

    Where a window is given, it is a ring that keeps the window of every token of a call of up to `chunk` tokens.
    """
    if window is not None and chunk is not None:
        slots = min(slots, ring_slots(window, chunk))
    shape = (repeats, batch, kv_heads, slots, width)
    pos = jnp.full((repeats, batch, 1, slots), -1, jnp.int32)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), pos, None if window is None else chunk)


def ring_slots(window: int, chunk: int) -> int:
    """The least ring in which a chunk's first query still finds its window after the chunk's last key is written.

    That is window + chunk - 1, in whole blocks, and a block to spare: then no block holds two generations of keys that
    a query sees, and blocks are visited in the order of a cache that never wraps.
    """
    return -(-(window + chunk - 1) // BLOCK) * BLOCK + BLOCK


def write(
    cache: KVCache, layer: Index, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], pos: Int[Array, "B T"]
) -> KVCache:
    """Stores k, v and their positions at their slots of one layer; padding (pos < 0) is dropped.

    A call's positions must be distinct modulo S within a row. Raises ValueError for more tokens than the cache is for.
    """
    slots, tokens = cache.k.shape[3], pos.shape[1]
    check_tokens(cache, tokens)
    # -1 % S would be a live slot, and JAX counts negative indices from the end: pads get indices out of range, each
    # its own so that the indices stay unique.
    dropped = slots + jnp.arange(tokens, dtype=pos.dtype)
    place = pos if cache.shift is None else pos - cache.shift[:, None]
    slot = jnp.where(pos < 0, dropped, place % slots)[..., None]
    row = jnp.arange(pos.shape[0])[:, None, None]
    # Every axis before the last is indexed: with a slice among them XLA transposes the whole stack to scatter into it.

    def put(stack: Array, new: Array) -> Array:
        head = jnp.arange(stack.shape[2])
        return stack.at[layer, row, head, slot].set(new.astype(stack.dtype), mode="drop", unique_indices=True)

    held = jnp.broadcast_to(pos[..., None], (*pos.shape, cache.pos.shape[2]))
    return replace(cache, k=put(cache.k, k), v=put(cache.v, v), pos=put(cache.pos, held))


def check_tokens(cache: KVCache, tokens: int) -> None:
    """Raises ValueError for more tokens than the cache is for."""
    if cache.chunk is not None and tokens > cache.chunk:
        raise ValueError(f"a call of {tokens} tokens, but this cache was made for {cache.chunk} at a time")


def capture(cache: KVCache, reader: Index, q: Float[Array, "B T K G H"], pos: Int[Array, "B T"]) -> KVCache:
    """Moves this call's queries into the last W of one reader of the cache; padding, which comes first, stays out."""
    assert cache.recent_q is not None
    window = cache.recent_q.shape[2]
    recent, q, pos = cache.recent_q[reader], q[:, -window:].astype(jnp.float32), pos[:, -window:]
    # Of the W old ones and n new ones in a row the last W: a row's new ones end the call.
    here, new = jnp.arange(window), (pos >= 0).sum(1, keepdims=True)
    order = jnp.where(here + new < window, here + new, here + pos.shape[1])
    recent = jnp.take_along_axis(jnp.concatenate([recent, q], 1), order[..., None, None, None], 1)
    return replace(cache, recent_q=cache.recent_q.at[reader].set(recent))


def is_full(one: Any) -> bool:
    """Whether one of a model's caches is of keys without a window: of all tokens, where none are evicted."""
    return isinstance(one, KVCache) and one.chunk is None


def size_bytes(cache: Any) -> int:
    """Bytes of all arrays of a tree, or of their shapes."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(cache))
