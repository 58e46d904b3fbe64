"""Eviction: from the scores of a press to the lists of slots that are kept, and to a smaller cache of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer import decoder
from jaxinfer.cache import KVCache, is_full
from jaxinfer.ops.votes import votes_reference
from jaxinfer.presses import LagKV, Press, SnapKV, one_list
from jaxinfer.programs import Prepare, program
from jaxinfer.segments import Layers

SMALL = 2**28  # bytes of a cache from which nothing is evicted unless told


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """How the cache of a prompt is made smaller before the answer. Caches with a window and states stay as they are.

    press: scores a layer's keys; each KV head keeps those of the largest scores.
    keep: tokens that a layer keeps, as the mean of all layers; 0: all of them. None: a quarter of the context, but at
        least 1024 and at most 4096, and all where the cache is small (pekkah/SharpInference's rule).
    one_list: one list for all heads and layers, by the sum of their scores.
    interleaved: evict after every chunk, so that a layer never holds more than keep + chunk tokens. That is another
        algorithm: each chunk's last queries decide, and what they do not look at is gone for later ones.
    """

    press: Press = field(default_factory=SnapKV)
    keep: int | None = None
    one_list: bool = False
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 0:
            raise ValueError(f"keep={self.keep} must be 0, for all tokens, or more")
        if self.keep and self.keep < self.press.window:
            raise ValueError(f"keep={self.keep} is below the {self.press.window} tokens that the press looks from")
        if self.interleaved and isinstance(self.press, LagKV):
            raise ValueError("LagKV ranks parts of a whole prompt: it cannot be interleaved with its chunks")

    def budget(self, context: int, size_bytes: int) -> int:
        """Tokens to keep of a context whose caches take `size_bytes` in all; 0 for all."""
        if self.keep is not None:
            return self.keep
        return 0 if size_bytes < SMALL else max(min(max(context // 4, 1024), 4096), self.press.window)


class Evicted(NamedTuple):
    cache: Any
    kept: Any  # for each stack of caches its list Int[R B L n], None where nothing is evicted


def observe(params: Any, cache: Any, config: Any, window: int) -> Any:
    """The cache with room for the queries of the last `window` tokens, in all layers that can be evicted from."""
    held = list(cache)
    for k, stack in _full(cache).items():
        spec, repeats = config.mixer(kind := params.layers.stacks[k].kind), stack.k.shape[0]
        if k == decoder.last_of(params.layers, kind):
            repeats += sum(params.sharing.stacks[n].kind == kind for n, _ in params.sharing.places())
        shape = (repeats, stack.k.shape[1], window, spec.kv_heads, spec.group, spec.width)
        held[k] = replace(stack, recent_q=jnp.zeros(shape))
    return tuple(held)


def unobserved(cache: Any) -> Any:
    """The cache without recent queries."""
    return tuple(replace(one, recent_q=None) if isinstance(one, KVCache) else one for one in cache)


def evict(
    params: Any,
    cache: Any,
    eviction: Eviction,
    keep: int,
    tokens: Sequence[int],
    room: int,
    *,
    votes: Callable[..., Array] = votes_reference,
    done: Callable[[KVCache], None] = lambda old: None,
    call: Callable[..., Any] = lambda program, *args, **options: program(*args, **options),
) -> Evicted:
    """The cache with about `keep` of each row's `tokens` in every layer without a window, and `room` for new ones.

    It goes stack by stack; `done(stack)` is called when one is there in its new size, and may delete the old one.
    `votes` is an operation of the device, see `Ops`; `call` makes the calls of jitted functions. Raises ValueError
    where the press cannot look at what the cache has.
    """
    press, full = eviction.press, _full(cache)
    if not press.window <= keep:
        raise ValueError(f"{keep=} is below the {press.window} tokens that the press looks from")
    if press.window > max(tokens):
        raise ValueError(f"the press looks from {press.window} tokens, but there are {max(tokens)}")
    for stack in full.values():
        if press.window > (seen := 0 if stack.recent_q is None else stack.recent_q.shape[2]):
            raise ValueError(f"the press looks from {press.window} tokens, but the cache has the queries of {seen}")
    if isinstance(press, LagKV) and any(stack.shift is not None for stack in full.values()):
        raise ValueError("LagKV ranks parts of a whole prompt, but some of it was evicted before")

    def scores(k: int) -> Any:  # Float[Array, "R B K S"], or its shape
        return call(_scores, press, full[k], params.layers.stacks[k].mixer.sinks, votes=votes)

    common, counts = [], _counts(press, params.layers, full, keep, tokens)
    if eviction.one_list:
        pos = next(iter(full.values())).pos
        common = call(_select_one, [scores(k) for k in full], pos, min(keep, pos.shape[3]), recent=press.window)
    held, kept = list(cache), [None] * len(cache)
    for i, (k, stack) in enumerate(full.items()):
        if eviction.one_list:
            lists = common[i]
        else:
            size = min(int(counts[k].max()), stack.k.shape[3])
            lists = call(select_jit, scores(k), size, counts[k][..., None])
        held[k], kept[k] = call(compact_jit, stack, lists, room), lists
        done(stack)
    return Evicted(tuple(held), tuple(kept))


def programs(
    params: Any,
    cache: Any,
    eviction: Eviction,
    keep: int,
    tokens: Sequence[int],
    room: int,
    *,
    votes: Callable[..., Array] = votes_reference,
) -> list[Prepare]:
    """What `evict` calls."""
    found = []

    def call(one: Any, *args: Any, **options: Any) -> Any:
        found.append(partial(one.prepare, *args, **options))
        return one.eval_shape(*args, **options)

    evict(params, jax.eval_shape(lambda: cache), eviction, keep, tokens, room, votes=votes, call=call)
    return found


def _full(cache: Any) -> dict[int, KVCache]:
    """The stacks of caches without a window."""
    return {k: one for k, one in enumerate(cache) if is_full(one)}


def _counts(
    press: Press, layers: Layers, full: dict[int, KVCache], keep: int, tokens: Sequence[int]
) -> dict[int, Int[np.ndarray, "R B"]]:
    """How many tokens each layer keeps of each row."""
    order = [k for k, _ in layers.places() if k in full]
    budgets = np.array([press.budgets(keep, n, len(order)) for n in tokens])  # [B, L]
    return {k: budgets[:, [i for i, other in enumerate(order) if other == k]].T for k in full}


@program(static_argnames=("press", "votes"))
def _scores(
    press: Press, cache: KVCache, sinks: Float[Array, "R N"] | None, *, votes: Callable[..., Array]
) -> Float[Array, "R B K S"]:
    """A press's scores of all keys of a stack of layers, one layer after the other: no more than one's temporaries."""
    repeats, batch, heads, _, width = cache.k.shape
    queries = cache.recent_q
    if queries is None:
        queries = jnp.zeros((repeats, batch, 0, heads, 1, width))
    valid = cache.pos.max((0, 2, 3))[:, None] - jnp.arange(queries.shape[2])[::-1] >= 0

    def one(q: Array, layer: Any) -> Array:
        def received(queries: Array, valid: Array, k: Array, pos: Array, sinks: Array | None) -> Array:
            return votes(queries, valid, cache.k, layer, pos, sinks)  # not of `k`, which would be a copy

        k, v, pos = (a[layer] for a in (cache.k, cache.v, cache.pos))
        sink = None if sinks is None else sinks[layer]
        return press(q, k, v, pos, valid, sink, received)

    scores = lax.map(lambda x: one(*x), (queries[:repeats], jnp.arange(repeats)))
    if len(queries) == repeats:
        return scores
    shared = lax.map(lambda q: one(q, repeats - 1), queries[repeats:])
    return scores.at[-1].add(shared.sum(0))


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


@program(static_argnames=("keep", "recent"))
def _select_one(
    scores: list[Float[Array, "R B K S"]], pos: Int[Array, "Q B 1 S"], keep: int, *, recent: int
) -> list[Int[Array, "R B 1 n"]]:
    """For each stack the one list by the scores of all layers."""
    total = jnp.stack([stack.sum((0, 2)) for stack in scores])[:, :, None]
    one = select(one_list(total, pos[0], recent=recent), keep)
    return [jnp.broadcast_to(one, (len(stack), *one.shape)) for stack in scores]


select_jit = program(static_argnames=("keep",))(select)
compact_jit = program(static_argnames=("room",))(compact)
