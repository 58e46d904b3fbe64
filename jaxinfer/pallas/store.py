"""All that lies between the products with q, k and v and attention, in one kernel, for the few tokens of decoding.

Heads are normed and turned, and keys, values and positions go to their slots, where the cache's stack lies. A warp has
a head, so that its sums are its own; plain loads and stores serve sm_80, 89 and 90 alike.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.cache import KVCache, check_tokens
from jaxinfer.layers.rope import Rope
from jaxinfer.pallas import registers
from jaxinfer.tree import Index

FEW = 8  # tokens of a call that this is for: decoding, and verifying a draft
WARPS, LANES = 4, 32  # of a CTA, of a warp


def beyond(q: Array, cache: KVCache, rotation: Rope | None, norms: tuple[Array | None, ...]) -> str | None:
    """Why the kernel does not store these, None where it does."""
    width, turned = cache.k.shape[4], _turned(rotation)
    if q.dtype not in (jnp.bfloat16, jnp.float16) or {cache.k.dtype, cache.v.dtype} != {q.dtype}:
        return f"queries of {q.dtype} and a cache of {cache.k.dtype} are not alike bfloat16 or float16"
    if width % (2 * LANES) or turned % (2 * LANES):
        return f"heads of {width}, of which {turned} are turned, are not both multiples of {2 * LANES}"
    if any(norm is not None and norm.shape[1] != width for norm in norms):
        return "a norm is of all heads together"
    return None


def _turned(rotation: Rope | None) -> int:
    """Elements of a head that are rotated."""
    return 0 if rotation is None else 2 * len(rotation.frequencies)


class _Cut(NamedTuple):
    """A head as a matrix [H / columns, columns], in pieces [n, vector] of it: a lane has a row's vector of each piece.

    The two elements of a pair are in the same place of two pieces.
    """

    columns: int
    vector: int
    pairs: tuple[tuple[Any, Any], ...]  # the first and the second elements of the pairs; none without a rotation
    rest: tuple[tuple[Any, Any], ...]


def _cut(width: int, rotation: Rope | None) -> _Cut:
    n = _turned(rotation)
    if rotation is not None and rotation.interleaved:
        columns = [pl.ds(i, 1) for i in range(2)]
        turned, others = pl.ds(0, n // 2), pl.ds(n // 2, (width - n) // 2)
        return _Cut(2, 1, tuple((turned, c) for c in columns), tuple((others, c) for c in columns if n < width))
    vector = math.gcd(8, n // 2 // LANES, (width - n) // LANES)  # 16 bytes at most
    whole, rows, half = pl.ds(0, vector), width // vector, n // 2 // vector
    pairs = ((pl.ds(0, half), whole), (pl.ds(half, half), whole)) if n else ()
    return _Cut(vector, vector, pairs, ((pl.ds(2 * half, rows - 2 * half), whole),) if n < width else ())


@partial(jax.jit, static_argnames=("rotation", "eps", "norm_values", "norm_rotated", "interpret"))
def store(
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
    interpret: bool = False,
) -> tuple[Float[Array, "B T K G H"], KVCache]:
    """`ops.store.store_reference` for bf16 and f16: norms and rotation in f32, each rounded to q's type as there.

    Cosines and sines are worked out by every warp: XLA would not take a table of them out of the loop over layers.
    Raises NotImplementedError for what is `beyond` it, ValueError for more tokens than the cache is for.
    """
    if why := beyond(q, cache, rotation, (q_norm, k_norm)):
        raise NotImplementedError(f"store: {why}")
    b, t, _ = q.shape
    check_tokens(cache, t)
    _, _, kv_heads, slots, width = cache.k.shape
    cut, heads = _cut(width, rotation), q.shape[2] // width
    pieces, shape = (*cut.pairs, *cut.rest), (width // cut.columns, cut.columns)
    per_q, per_kv = math.gcd(heads, WARPS), math.gcd(kv_heads, WARPS)  # heads of a CTA
    q_tiles, kv_tiles = heads // per_q, 0 if k is None else kv_heads // per_kv
    frequencies = None
    if rotation is not None:
        frequencies = jnp.asarray(rotation.frequencies, jnp.float32).reshape(-1, cut.vector)

    def store_keys(
        layer_gmem, pos_gmem, shift_gmem, turns_gmem, q_norm_gmem, k_norm_gmem, q_gmem, k_gmem, v_gmem, *rest
    ):
        k_stack, v_stack, pos_stack, q_out = rest
        token, tile = lax.axis_index("token"), lax.axis_index("tile")
        layer, row, at = layer_gmem[0], lax.div(token, t), pos_gmem[token]

        def move(source: Any, target: Any, rows: int, *, turn: bool, norm: bool, weight: Any = None) -> None:
            layout = _layout(rows, cut.vector)

            def across(x: Array, like: Array, dims: list[int]) -> Array:
                return plgpu.layout_cast(lax.broadcast_in_dim(x, like.shape, dims), layout)

            def common(ref: Any) -> Array:
                """What all heads share, in f32."""
                return plgpu.load(ref, layout=layout.reduce(0), optimized=False).astype(jnp.float32)

            def normed(xs: list[Array], weight: Any) -> list[Array]:
                ys = [x.astype(jnp.float32) for x in xs]
                squares = sum((y * y).sum(axis=2).sum(axis=1) for y in ys)
                inverse = lax.rsqrt(squares / width + eps)
                ys = [y * across(inverse, y, [0]) for y in ys]
                if weight is not None:
                    weights = (common(weight.at[layer, *piece]) for piece in pieces)
                    ys = [y * across(w, y, [1, 2]) for y, w in zip(ys, weights, strict=True)]
                return [y.astype(q.dtype) for y in ys]

            def turned(first: Array, second: Array, *others: Array) -> list[Array]:
                assert rotation is not None
                a, b = first.astype(jnp.float32), second.astype(jnp.float32)
                angle = at.astype(jnp.float32) * common(turns_gmem)
                cos, sin = (across(f(angle) * rotation.magnitude, a, [1, 2]) for f in (jnp.cos, jnp.sin))
                return [(a * cos - b * sin).astype(q.dtype), (a * sin + b * cos).astype(q.dtype), *others]

            xs = [plgpu.load(source.at[:, *piece], layout=layout, optimized=False) for piece in pieces]
            xs = normed(xs, weight) if norm else xs
            if turn:
                xs = xs if rotation is None else turned(*xs)
                xs = normed(xs, None) if norm_rotated else xs
            for x, piece in zip(xs, pieces, strict=True):
                registers.store(target.at[:, *piece], x)

        @pl.when(tile < q_tiles)
        def queries() -> None:
            some = token, pl.ds(tile * per_q, per_q)
            move(q_gmem.at[some], q_out.at[some], per_q, turn=True, norm=q_norm is not None, weight=q_norm_gmem)

        if k is None:
            return
        slot = (at if shift_gmem is None else at - shift_gmem[row]) % slots
        first = lax.rem(tile - q_tiles, kv_tiles) * per_kv
        some, place = (token, pl.ds(first, per_kv)), (layer, row, pl.ds(first, per_kv), slot)
        keys, real = tile < q_tiles + kv_tiles, at >= 0

        @pl.when((tile >= q_tiles) & keys & real)
        def _() -> None:
            norm = k_norm is not None
            move(k_gmem.at[some], k_stack.at[place], per_kv, turn=True, norm=norm, weight=k_norm_gmem)
            own = cache.pos.shape[2] > 1  # heads have positions of their own

            @pl.when(own | (first == 0))
            def _() -> None:
                for i in range(per_kv if own else 1):
                    pos_stack[layer, row, first + i, slot] = at

        @pl.when(~keys & real)
        def _() -> None:
            source = k_gmem if v_gmem is None else v_gmem
            move(source.at[some], v_stack.at[place], per_kv, turn=False, norm=norm_values)

    def view(a: Array | None, *heads: int) -> Array | None:
        """With heads as `cut` has them: the same bytes."""
        return None if a is None else a.reshape(*(heads or a.shape[:-1]), *shape)

    stacks: Any = (None,) * 3
    if k is not None:
        stacks = [jax.new_ref(a) for a in (view(cache.k), view(cache.v), cache.pos)]  # written in place
    out = plgpu.kernel(
        store_keys,
        out_type=jax.ShapeDtypeStruct((b * t, heads, *shape), q.dtype),
        grid=(b * t, q_tiles + 2 * kv_tiles),
        grid_names=("token", "tile"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        pos.reshape(-1),
        cache.shift,
        frequencies,
        view(q_norm),
        view(k_norm),
        view(q, b * t, heads),
        view(k, b * t, kv_heads),
        view(v, b * t, kv_heads),
        *stacks,
    )
    if k is not None:
        k, v, held = (jax.freeze(ref) for ref in stacks)
        cache = replace(cache, k=k.reshape(cache.k.shape), v=v.reshape(cache.v.shape), pos=held)
    return out.reshape(b, t, kv_heads, -1, width), cache


def _layout(heads: int, vector: int) -> Any:
    """Of [heads, n * LANES, vector], a warp having a head; where there are fewer than warps, several have the same."""
    spare = WARPS // heads
    warps = ((-3,) if heads > 1 else ()) + ((plgpu.Replicated(spare),) if spare > 1 else ())
    return plgpu.Layout.TILED(plgpu.Tiling(((heads, LANES, vector),)), warps, (-2,), -1)
