"""What attention kernels share: what they cover, which blocks a tile of queries visits, and how splits share them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from jaxinfer.cache import KVCache

type Scalar = Int[Array, ""] | int


def beyond(cache: KVCache, dtype: DTypeLike) -> str | None:
    """Why the kernels do not attend with queries of a type to this cache, None where they do."""
    *_, slots, width = cache.k.shape
    if dtype not in (jnp.bfloat16, jnp.float16) or {cache.k.dtype, cache.v.dtype} != {jnp.dtype(dtype)}:
        return f"queries of {jnp.dtype(dtype)} and a cache of {cache.k.dtype} are not alike bfloat16 or float16"
    if width % (16 if width <= 256 else 32) or width > 512:
        return f"heads of {width} are no multiple of 16 up to 256, nor of 32 up to 512"
    return f"{slots} slots are no multiple of 16" if slots % 16 else None


class Visit(NamedTuple):
    """Blocks of slots to visit, in the order of positions: (first + i) % blocks for i in [0, count).

    In those from `plain` to `edge` every query of the tile sees every key: only the others need a mask.
    """

    first: Scalar
    count: Scalar  # pyright: ignore[reportIncompatibleMethodOverride]
    plain: Scalar
    edge: Scalar


def visit(
    oldest: Scalar,
    newest: Scalar,
    shift: Scalar | None,
    *,
    slots: int,
    block: int,
    window: int | None,
    aligned: bool = False,
    skip: bool = True,
) -> Visit:
    """The blocks in which some query at a position from `oldest` to `newest` may see a key.

    Position p lies in slot (p - shift) % slots, where `slots` is a multiple of `block`; a shift of None is 0, and says
    that nothing was ever evicted: then slots up to the newest token's hold all positions of a full cache, and those of
    a ring the last `slots` of them. After an eviction slots may be empty anywhere, and every block needs the mask.
    A tile whose `newest` is below zero is padding and visits nothing; where `oldest` is, some of it is, and every block
    needs the mask. Without `skip` all blocks are visited, under the mask; a full cache in the same order.
    """
    blocks = slots // block

    def seen_from(p: Scalar) -> Scalar:
        assert window is not None
        return jnp.maximum(p // window * window if aligned else p - window + 1, 0)

    gone = 0 if shift is None else shift
    lo = 0
    if window is not None:  # padding hides the oldest: then all that a ring holds, but for its spare block
        lo = jnp.where(newest < slots, 0, newest + 1 - (slots - block))
        lo = jnp.where(oldest < 0, lo, seen_from(oldest))
    if window is None:  # a full cache never wraps, and what eviction kept lies from slot 0 on
        start, first, count = 0, 0, (newest - gone) // block + 1
    else:
        start, end = (lo - gone) % slots, (newest - gone) % slots
        first, last = start // block, end // block
        count = jnp.where(start <= end, last - first + 1, blocks - first + last + 1)
    count = jnp.where(newest < 0, 0, jnp.clip(count, 0, blocks))
    if not skip:
        return Visit(first, jnp.where(newest < 0, 0, blocks), 0, 0)
    if shift is not None:
        return Visit(first, count, 0, 0)
    origin = lo - start % block  # the position at the start of the first block
    least = 0 if window is None else seen_from(newest)
    plain = jnp.minimum(-((origin - least) // block), count)
    edge = jnp.clip((oldest + 1 - origin) // block, plain, count)
    return Visit(first, count, jnp.where(oldest < 0, 0, plain), jnp.where(oldest < 0, 0, edge))


def part(count: Scalar, split: Scalar, splits: int, least: int) -> tuple[Scalar, Scalar]:
    """Of `count` blocks those of one split, [start, stop): as many splits share them as have `least` blocks each.

    That depends on a row's own length alone, and so do the bits of its result.
    """
    used = jnp.clip(count // least, 1, splits)
    return jnp.where(split < used, count * split // used, 0), jnp.where(split < used, count * (split + 1) // used, 0)
