"""Caches as values: positions are stored beside what they belong to, so that masks never depend on slot order."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxinfer.tree import Index, pytree


@pytree
class KVCache:
    """Keys and values of one layer of a segment's pattern, behind the segment's repeats.

    Position p of a row lives in slot p % S: a full cache is a ring that never wraps. A slot whose `pos` is negative is
    empty. Positions are the same for all heads (P = 1), or each head has its own (P = K), as eviction may leave them.
    """

    k: Float[Array, "R B K S H"]
    v: Float[Array, "R B K S H"]
    pos: Int[Array, "R B P S"]


def empty(repeats: int, batch: int, kv_heads: int, slots: int, width: int, dtype: DTypeLike) -> KVCache:
    """A cache that holds nothing. k and v are buffers of their own, so that both can be donated."""
    shape = (repeats, batch, kv_heads, slots, width)
    pos = jnp.full((repeats, batch, 1, slots), -1, jnp.int32)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), pos)


def write(
    cache: KVCache, layer: Index, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], pos: Int[Array, "B T"]
) -> KVCache:
    """Stores k, v and their positions at their slots of one layer; padding (pos < 0) is dropped.

    A call's positions must be distinct modulo S within a row: at most S tokens, and no two a ring's length apart.
    """
    slots = cache.k.shape[3]
    # -1 % S would be a live slot, and JAX counts negative indices from the end: pads get indices out of range, each
    # its own so that the indices stay unique.
    dropped = slots + jnp.arange(pos.shape[1], dtype=pos.dtype)
    slot = jnp.where(pos < 0, dropped, pos % slots)[..., None]
    row = jnp.arange(pos.shape[0])[:, None, None]
    # Every axis before the last is indexed: with a slice among them XLA transposes the whole stack to scatter into it.

    def put(stack: Array, new: Array) -> Array:
        head = jnp.arange(stack.shape[2])
        return stack.at[layer, row, head, slot].set(new.astype(stack.dtype), mode="drop", unique_indices=True)

    held = jnp.broadcast_to(pos[..., None], (*pos.shape, cache.pos.shape[2]))
    return KVCache(put(cache.k, k), put(cache.v, v), put(cache.pos, held))
