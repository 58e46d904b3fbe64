"""Eviction: from the scores of a press to the list of slots that are kept, and to a smaller cache of them."""

from dataclasses import replace

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.cache import KVCache


def select(
    scores: Float[Array, "*batch S"], keep: int, count: Int[Array, "*#batch"] | None = None
) -> Int[Array, "*batch {keep}"]:
    """The slots of the `keep` largest scores, ascending; of equal ones the lower slots. Empty slots have -inf.

    With `count`, which broadcasts, only as many are kept: layers that are stacked share a size and not a budget. Where
    there are fewer the list ends with numbers from S on, which name no slot, so that it is strictly increasing always.
    """
    slots = scores.shape[-1]
    if not 1 <= keep <= slots:
        raise ValueError(f"{keep=} must be from 1 to the {slots} slots")
    top, slot = lax.top_k(scores, keep)
    rank = jnp.arange(keep, dtype=slot.dtype)
    taken = top > -jnp.inf
    if count is not None:
        taken &= rank < count[..., None]
    return jnp.sort(jnp.where(taken, slot, slots + rank))


def compact(cache: KVCache, keep: Int[Array, "R B L n"], room: int) -> KVCache:
    """A smaller cache of n + room slots: those of the list in its order, bit for bit, then the room for new tokens.

    L is 1 for one list of all heads, or K, and then each head has positions of its own. Numbers from S on leave a slot
    empty. New tokens go on at slot min(P, n) for a row of P tokens: a row that keeps all of its own stays as it is.
    """
    if cache.chunk is not None:
        raise ValueError(f"a ring of {cache.k.shape[3]} slots is bounded by its window and stays as it is")
    slot = jnp.pad(keep, ((0, 0), (0, 0), (0, 0), (0, room)), constant_values=cache.k.shape[3])

    def take(a: Array, index: Array, empty: int) -> Array:
        return jnp.take_along_axis(a, index, axis=3, mode="fill", fill_value=empty)

    k, v = (take(a, slot[..., None], 0) for a in (cache.k, cache.v))
    shift = jnp.maximum(cache.pos.max((0, 2, 3)) + 1 - keep.shape[3], 0)
    return replace(cache, k=k, v=v, pos=take(cache.pos, slot, -1), shift=shift)
