"""Products of a few tokens with weights of 16 bits, at the speed of memory (Hopper).

A warpgroup multiplies 16 rows of a weight, whose columns its four warps share. TMA copies rows ahead of it into a ring;
a multiprocessor has as many CTAs as there is work for, three at most, and their rings fill its shared memory. The
tensor cores multiply 16 rows with 8 tokens, of which the last one is there as often as some are lacking: 16 bytes of a
weight take a thread about a dozen instructions, and the memory leaves it time for a hundred.

A row's sum has one order, which the weight's width alone gives: of every 512 columns (256, where those do not divide
the width) each warp adds a quarter to the one f32 sum that it has, 16 columns at a time; then the warps' sums are added
in their order. A token is a column of the product, so that its bits do not depend on the others.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from itertools import product as pairs
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxinfer.pallas import registers
from jaxinfer.pallas.registers import SUMS, Sums, halves, tiled
from jaxinfer.pallas.units import load
from jaxinfer.quants import Packed
from jaxinfer.tree import Index

KINDS = jnp.bfloat16, jnp.float16
MOST, COLUMNS = 16, 8  # tokens of a launch; of a product on the tensor cores
ROWS, WARPS, THREADS = 16, 4, 128  # rows of such a product; of a warpgroup
LEAST, WHOLE = 256, 64  # columns of a weight, and what divides them
PROCESSORS, SHARED = 132, 233_472  # multiprocessors of an H100 or H200, and bytes that the CTAs of one share
PLACES, SPARE = 3, 2048  # such CTAs, at most; bytes of each for barriers and for the driver
MANY = 4  # tokens above which two tiles of rows share them: of 16 the cache would give a tile as much x as weights


def beyond(weights: Sequence[Any], parts: int = 1) -> str | None:
    """Why no launch multiplies with these weights, or with equal parts of the rows of each; None where one does."""
    for w in weights:
        if isinstance(w, Packed) or w.dtype not in KINDS:
            return f"{w.format.name if isinstance(w, Packed) else w.dtype} is not bfloat16 or float16"
        *_, rows, width = w.shape
        if rows % (parts * ROWS) or width % WHOLE or width < LEAST:
            return f"{rows} x {width} are not rows by {parts * ROWS} of {LEAST} elements at least, by {WHOLE}"
    return "weights of bfloat16 and of float16" if len({str(w.dtype) for w in weights}) > 1 else None


@partial(jax.jit, static_argnames=("eps", "combine", "dtype", "interpret"))
def product(
    x: Float[Array, "M D"],
    weights: Sequence[Sequence[Float[Array, "..."]]],
    layer: Index,
    *,
    norm: Float[Array, "R D"] | None = None,
    eps: float | None = None,
    experts: Int[Array, " C"] | None = None,
    biases: Sequence[Sequence[Float[Array, "..."]]] | None = None,
    combine: Callable[..., Array] | None = None,
    residual: Float[Array, "C F"] | None = None,
    dtype: DTypeLike,
    interpret: bool = False,
) -> tuple[Float[Array, "C _"], ...]:
    """y = w[layer] x for M = C tokens, 16 at most, and each w [R, F, D], in one launch, summed in f32.

    Operands are of x's type, bf16 or f16, to which weights are rounded. With an `eps` x is normed before,
    rms_norm(x, norm[layer], eps): a single token by every CTA while its first rows are under way, which takes a 16th of
    their bytes from the second-level cache; several by a launch before, as that share would grow with them.

    A set of several weights of equal shapes gives one result, combine(y, ...). A single one gives y or, where there is
    something to combine, combine(first half of y, second half). `biases` [R, F], one for each weight, are added to its
    products before. The `residual` is added to the only result.

    With `experts`, weights are [R, E, F, D] and biases [R, E, F], and each of a token's A = C / M choices is a row:
    y[c] = w[layer, experts[c]] x[c // A]. Where there is no such expert nothing is read, and combined results are 0.

    Raises NotImplementedError for what is `beyond` the kernel, other activations and more tokens; ValueError for
    shapes that do not fit.
    """
    (m, width), axes = x.shape, 3 if experts is None else 4
    c = m if experts is None else len(experts)
    if c % m:
        raise ValueError(f"{c} choices are no multiple of {m} tokens")
    if norm is not None and eps is None:
        raise ValueError("a norm needs its eps")
    if x.dtype not in KINDS:
        raise NotImplementedError(f"product: activations of {x.dtype}")
    if experts is None and m > MOST:
        raise NotImplementedError(f"product: {m} tokens are more than {MOST}")
    parts = [2 if combine is not None and len(one) == 1 else 1 for one in weights]
    for some, n in ((list(chain(*weights)), 1), *zip(weights, parts, strict=True)):
        if why := beyond(some, n):
            raise NotImplementedError(f"product: {why}")
        for w in some:
            if w.ndim != axes or w.shape[-1] != width:
                raise ValueError(f"a stack of shape {w.shape} has not {axes} axes and rows of {width}")
    tokens = m if experts is None else 1  # of a CTA
    if eps is not None and tokens > 1:
        x, norm, eps = normed(x, norm, layer, eps, interpret=interpret), None, None
    heights = [one[0].shape[-2] // n for one, n in zip(weights, parts, strict=True)]
    counts = [len(one) * n for one, n in zip(weights, parts, strict=True)]  # products of a set
    tiles = 2 if tokens > MANY and max(counts) == 1 and not any(n % (2 * ROWS) for n in heights) else 1
    own = 128 if width % (4 * 128) == 0 else 64  # columns of a step that a warp has
    step = WARPS * own
    steps, blocks = -(-width // step), -(-tokens // COLUMNS)
    grid = (1 if experts is None else c, sum(heights) // (tiles * ROWS))
    sums = (tiles * max(counts), blocks, ROWS, WARPS, COLUMNS)
    places = min(-(-grid[0] * grid[1] // PROCESSORS), PLACES)
    room = SHARED // places - SPARE - 4 * math.prod(sums)
    depth = max(min(steps, room // (2 * step * ROWS * tiles * max(counts))), 1)
    multiply = partial(registers.mma_halves, interpret=interpret)
    X, rows_layout = halves(COLUMNS, own), halves(ROWS, own)
    flat = [[w.reshape(-1, width) for w in one] for one in weights]
    biases = [[b.reshape(-1, ROWS) for b in one] for one in biases or ()]
    if residual is not None:
        residual = residual.reshape(c, -1, ROWS)

    def few_products(layer_gmem, experts_gmem, x_gmem, norm_gmem, weights_gmem, biases_gmem, residual_gmem, *rest):
        *outs_gmem, ring, full, sums_smem = rest
        tile, choice = lax.axis_index("tile"), lax.axis_index("choice")
        layer, count, chosen = layer_gmem[0], steps, True
        stack, token = layer, lax.div(choice, jnp.int32(c // m))
        if experts is not None:
            expert, among = experts_gmem[choice], weights[0][0].shape[1]
            chosen = (expert >= 0) & (expert < among)
            stack, count = layer * among + jnp.where(chosen, expert, 0), jnp.where(chosen, steps, 0)

        def begin(i: Any) -> Array:
            """The last step ends with the row, and has some columns in common with the one before."""
            return jnp.minimum(i * step, width - step)

        def one_set(i: int, mine: Array) -> None:
            each = [
                (j, (stack * parts[i] + part) * (heights[i] // ROWS) + mine * tiles + t)
                for t, j, part in pairs(range(tiles), range(len(weights[i])), range(parts[i]))
            ]

            def copy(s: Any) -> None:
                slot = lax.rem(s, depth)
                for k, (j, at) in enumerate(each):
                    here = pl.ds(at * ROWS, ROWS), pl.ds(begin(s), step)
                    plgpu.copy_gmem_to_smem(weights_gmem[i][j].at[here], ring.at[slot, k], full[i].at[slot])

            for s in range(depth):
                pl.when(s < count)(partial(copy, jnp.int32(s)))
            inverse = None
            if eps is not None:
                inverse = _inverse(load(x_gmem.at[pl.ds(token * width, width)], layout=_strided(width)), eps)

            def given(s: Any, block: int) -> Array:
                """Columns of x for 8 tokens, the last of them as often as there are fewer."""
                row, column = (plgpu.broadcasted_iota(jnp.int32, (COLUMNS, step), d, layout=X) for d in (0, 1))
                row = token + jnp.minimum(COLUMNS * block + row, tokens - 1)
                y = registers.gather(x_gmem, row * width + begin(s) + column, X, interpret=interpret)
                if inverse is not None:
                    y = y.astype(jnp.float32) * inverse
                    if norm_gmem is not None:
                        weight = load(norm_gmem.at[layer, pl.ds(begin(s), step)], layout=X.reduce((0,)))
                        weight = lax.broadcast_in_dim(weight.astype(jnp.float32), y.shape, [1])
                        y *= plgpu.layout_cast(weight, X)
                    y = y.astype(x.dtype)
                return y if width % step == 0 else jnp.where(column >= s * step - begin(s), y, 0)

            def one_step(s: Any, ys: list[list[Sums]]) -> list[list[Sums]]:
                slot = lax.rem(s, depth)
                xs = [given(s, block) for block in range(blocks)]  # loaded while the weights arrive
                plgpu.barrier_wait(full[i].at[slot])
                out = []
                for k, sums in enumerate(ys):
                    w = load(ring.at[slot, k], layout=rows_layout).astype(x.dtype)
                    out.append([multiply(y, w, b) for y, b in zip(sums, xs, strict=True)])
                plgpu.commit_smem()  # all have read what the next copy overwrites
                pl.when(s + depth < count)(lambda: copy(s + depth))
                return out

            zero = plgpu.layout_cast(jnp.zeros((ROWS, WARPS, COLUMNS), jnp.float32), SUMS)
            ys = lax.fori_loop(0, count, one_step, [[zero] * blocks for _ in each])
            for k, block in pairs(range(len(each)), range(blocks)):
                registers.store(sums_smem.at[k, block], ys[k][block])
            plgpu.commit_smem()

            def total(k: int, t: int, few: int) -> Array:
                block, column = divmod(t, COLUMNS)
                own, (j, at) = sums_smem.at[k, block, :, :, pl.ds(column, few)], each[k]
                found = [load(own.at[:, w].transpose((1, 0)), layout=_results(few)) for w in range(WARPS)]
                y = sum(found[1:], found[0])
                if biases:
                    bias = load(biases_gmem[i][j].at[at], layout=_results(few).reduce((0,))).astype(jnp.float32)
                    y += plgpu.layout_cast(lax.broadcast_in_dim(bias, y.shape, [1]), _results(few))
                return y

            for (t, few), part in pairs(_powers(tokens), range(tiles)):
                where = pl.ds(choice + t, few), mine * tiles + part
                ys = [total(part * counts[i] + k, t, few) for k in range(counts[i])]
                y = ys[0] if combine is None else combine(*ys)
                if experts is not None:
                    y = jnp.where(chosen, y, 0.0)
                if residual is not None:
                    y = y + load(residual_gmem.at[where], layout=_results(few)).astype(jnp.float32)
                registers.store(outs_gmem[i].at[where], y.astype(dtype))

        before = 0
        for i, height in enumerate(heights):
            mine = tile - before
            pl.when((mine >= 0) & (mine < height // (tiles * ROWS)))(partial(one_set, i, mine))
            before += height // (tiles * ROWS)

    outs = plgpu.kernel(
        few_products,
        out_type=tuple(jax.ShapeDtypeStruct((c, n // ROWS, ROWS), dtype) for n in heights),
        grid=grid,
        grid_names=("choice", "tile"),
        scratch_types=[
            plgpu.SMEM((depth, tiles * max(counts), ROWS, step), weights[0][0].dtype, transforms=tiled(step)),
            [plgpu.Barrier(num_arrivals=tiles * n, num_barriers=depth) for n in counts],
            plgpu.SMEM(sums, jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(jnp.asarray(layer, jnp.int32).reshape(1), experts, x.reshape(-1), norm, flat, biases, residual)
    return tuple(o.reshape(c, -1) for o in outs)


def normed(
    x: Float[Array, "M D"], norm: Float[Array, "R D"] | None, layer: Index, eps: float, *, interpret: bool = False
) -> Float[Array, "M D"]:
    """rms_norm(x, norm[layer], eps) in one launch, with the bits of a `product` of one token that has this norm."""
    m, width = x.shape
    layout = _strided(width)

    def norm_rows(layer_gmem, x_gmem, norm_gmem, out_gmem):
        token = lax.axis_index("token")
        x = load(x_gmem.at[token], layout=layout)
        y = x.astype(jnp.float32) * _inverse(x, eps)
        if norm_gmem is not None:
            y *= load(norm_gmem.at[layer_gmem[0]], layout=layout).astype(jnp.float32)
        registers.store(out_gmem.at[token], y.astype(x.dtype))

    return plgpu.kernel(
        norm_rows,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(m,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(jnp.asarray(layer, jnp.int32).reshape(1), x, norm)


def _inverse(x: Float[Array, " D"], eps: float) -> Float[Array, ""]:
    """1 / sqrt(mean(x^2) + eps). Squares of 16 bits are exact in f32, whatever a compiler contracts."""
    x = x.astype(jnp.float32)
    return lax.rsqrt((x * x).sum() * (1 / len(x)) + eps)


def _strided(width: int) -> Any:
    """Of a row, a warpgroup having it in vectors of 16 bytes at most; each warp, where they do not divide it."""
    if width % THREADS:
        return registers.layout([(WHOLE,), (2,)], (plgpu.Replicated(WARPS),), (-2,))
    return plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(width // THREADS, 8))


def _powers(tokens: int) -> Iterator[tuple[int, int]]:
    """The first and the number of tokens in parts that are powers of 2, the largest first, which are columns."""
    first = 0
    while first < tokens:
        few = min(1 << (tokens - first).bit_length() - 1, COLUMNS)
        yield first, few
        first += few


def _results(few: int) -> Any:
    """Of [token, row], one for each thread; where there are fewer, several have the same."""
    lanes = min(few, 2)
    spare = WARPS * lanes // few
    warps = [-5] * (few > lanes) + [plgpu.Replicated(spare)] * (spare > 1)
    return registers.layout(
        [(few, ROWS), (lanes, ROWS), (1,)], warps, [-3, -2] if lanes == 2 else [-2, plgpu.Replicated(2)]
    )
