"""Products of many rows on Hopper: grouped by expert, with each one's weight (MegaBlocks, arXiv:2211.15841), or not.

The product is transposed: a weight's rows are the 64 of the tensor cores' product, and rows of x its columns, of which
there may be few. Two warpgroups multiply, each 64 rows of a weight, or of gate one and of up the other; a third one
copies ahead of them, also across groups of rows. Packed weights are decoded into the registers that a product takes its
left operand from, while the one before it runs; a value is decoded once for up to 256 rows of x.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxinfer.pallas import registers, units
from jaxinfer.pallas.limbs import RUN
from jaxinfer.pallas.registers import SUMS, TURNED, tiled, when
from jaxinfer.pallas.tiles import TILES, UNIT, Tile
from jaxinfer.quants import Packed, Weight, at, dense
from jaxinfer.tree import Index

ROWS, CHUNK = 64, 64  # of a product; elements of a row of x that are copied at once
COMPUTING = 2  # warpgroups
COLUMNS = 256  # of a warpgroup's sums, which are half of its registers then
DECODING, ENDS = 64, 8  # rows of x whose products take as long as decoding, and as what an item begins and ends with
PIECE, OUTS = 32, 2  # rows of the result that are stored at once; such pieces on their way
REGISTERS = 24, 240  # of the copying and the computing warpgroups' threads: together 24 + 2 * 240 <= 3 * 168
PROCESSORS = 132  # of an H100 or H200
SHARED = 226 * 1024  # bytes of a multiprocessor's shared memory, less what barriers take
SIGNED = {"MXFP4": 7, "Q8_0": 8, "IQ4_NL": 8, "IQ4_XS": 8}  # bits of the codes that may be negative
ACC: Any = plgpu.WGMMAAccumulatorRef
ROW = plgpu.Layout.WGMMA.reduce(1)


def beyond(weights: Sequence[Any], parts: int = 1) -> str | None:
    """Why the kernel does not multiply with weights, or with equal parts of their rows; None where it does."""
    for w in weights:
        *_, rows, width = w.shape
        if isinstance(w, Packed) and w.format.name not in TILES:
            return f"{w.format.name} is read by no kernel"
        if not isinstance(w, Packed) and w.dtype not in (jnp.bfloat16, jnp.float16):
            return f"{w.dtype} is no type of its operands"
        least = UNIT if isinstance(w, Packed) else CHUNK
        if rows % (parts * ROWS) or width % CHUNK or width < least:
            return f"{rows} x {width} are not rows by {parts * ROWS} of elements by {CHUNK}, {least} at least"
    if len({isinstance(w, Packed) for w in weights}) > 1:
        return "one weight is packed, another is not"
    return None


def permuted(x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """Each 16 columns of x in the order that products with packed weights take, registers.PERMUTED."""
    return x.reshape(*x.shape[:-1], -1, 4, 2, 2).swapaxes(-3, -2).reshape(x.shape)


def reference(
    x: Float[Array, "N D"],
    weights: Sequence[Weight],
    layer: Index,
    starts: Int[Array, " edges"],
    *,
    tile: int,
    biases: Sequence[Array] | None = None,
    combine: Callable[..., Array] | None = None,
    dtype: DTypeLike,
) -> Float[Array, "N F"]:
    """`grouped`, with all columns in their own order."""

    def one(operands: tuple[Array, Array]) -> Array:
        rows, e = operands
        ys = [jnp.dot(rows, dense(at(w, layer, e), x.dtype).T, preferred_element_type=jnp.float32) for w in weights]
        ys = ys if biases is None else [y + b[layer, e] for y, b in zip(ys, biases, strict=True)]
        if combine is not None and len(ys) == 1:
            ys = jnp.split(ys[0], 2, axis=1)
        return (ys[0] if combine is None else combine(*ys)).astype(dtype)

    tiles = x.reshape(-1, tile, x.shape[1])
    expert = (starts[1:, None] <= jnp.arange(len(tiles))).sum(0)
    return lax.map(one, (tiles, expert)).reshape(len(x), -1)


class Items(NamedTuple):
    """What CTAs share: runs of tiles of one expert, as many as a product takes at once."""

    expert: Int[Array, " n"]
    first: Int[Array, " n"]  # its first tile
    tiles: Int[Array, " n"]  # how many
    starts: Int[Array, " E+1"]  # where each expert's items begin; the last is how many there are: others mean nothing


def items_of(starts: Int[Array, " edges"], n_tiles: int, most: int) -> Items:
    """Up to `most` of an expert's tiles are an item; expert e has those from starts[e] up to starts[e + 1] <= n_tiles.

    Two launches: sums over all experts before are one, where a scan is several.
    """
    experts = len(starts) - 1
    sizes = starts[1:] - starts[:-1]
    earlier = jnp.tri(experts + 1, experts, -1, bool)
    ends = jnp.where(earlier, -(-sizes // most), 0).sum(1, dtype=jnp.int32)
    i = jnp.arange(min(n_tiles, n_tiles // most + experts), dtype=jnp.int32)[:, None]
    mine = (ends[:-1] <= i) & (i < ends[1:])
    done = most * (i - ends[:-1])  # tiles of an expert that items before have

    def of_mine(a: Array) -> Array:
        return jnp.where(mine, a, 0).sum(1, dtype=jnp.int32)

    return Items(
        expert=of_mine(jnp.arange(experts, dtype=jnp.int32)),
        first=of_mine(starts[:-1] + done),
        tiles=of_mine(jnp.minimum(sizes - done, most)),
        starts=ends,
    )


@partial(jax.jit, static_argnames=("tile", "combine", "dtype", "permute", "widths", "ctas", "interpret"))
def grouped(
    x: Float[Array, "N D"],
    weights: Sequence[Weight],
    layer: Index,
    starts: Int[Array, " edges"],
    *,
    tile: int,
    biases: Sequence[Float[Array, "R E _"]] | None = None,
    combine: Callable[..., Array] | None = None,
    dtype: DTypeLike,
    permute: bool = False,
    widths: tuple[int, ...] = tuple(range(ROWS, COLUMNS + 1, ROWS)),
    ctas: int = PROCESSORS,
    interpret: bool = False,
) -> Float[Array, "N F"]:
    """y = w[layer, e] x + bias[layer, e] for each tile of rows of x and its expert e, summed in f32.

    Of two weights [R, E, F, D], or of the two halves of the rows of one, it is combine(y, y). Where weights are packed,
    x has to be `permuted`; with `permute` the result is. Expert e has the tiles from starts[e] up to starts[e + 1];
    those behind the last one cost nothing, and their rows of the result are not defined. A row's bits depend neither on
    the other rows nor on `tile` and `widths`.

    widths: how many rows of x a product takes: the fewest that hold an expert's tiles, or the most. ctas: that share
    the work. Raises NotImplementedError for what `beyond` names, ValueError for what does not fit together.
    """
    _check(x, weights, combine, 4)
    if len(x) % tile or len(starts) != weights[0].shape[1] + 1:
        raise ValueError(f"{len(x)} rows, {len(starts)} starts: no tiles of {tile} of {weights[0].shape[1]} experts")
    if tile % 16 or widths[-1] % tile:
        raise ValueError(f"{tile=} is no multiple of 16 that divides {widths[-1]}")
    if permute and jnp.dtype(dtype).itemsize != 2:
        raise ValueError(f"results of {jnp.dtype(dtype)} are not permuted")
    items = items_of(starts, len(x) // tile, widths[-1] // tile)
    one = _Set.of(weights, combine, x.dtype, interpret)
    options = {"tile": tile, "widths": widths, "combine": combine, "dtype": dtype, "permute": permute}
    return _launch(x, [one], layer, items, [biases or ()], **options, ctas=ctas, interpret=interpret)[0]


@partial(jax.jit, static_argnames=("combine", "dtype", "width", "ctas", "interpret"))
def ungrouped(
    x: Float[Array, "M D"],
    sets: Sequence[Sequence[Weight]],
    layer: Index,
    *,
    combine: Callable[..., Array] | None = None,
    dtype: DTypeLike,
    width: int | None = None,
    ctas: int = PROCESSORS,
    interpret: bool = False,
) -> tuple[Float[Array, "M _"], ...]:
    """y = w[layer] x for each set of one weight [R, F, D], in one launch, summed in f32; x in the order of its columns.

    A set of two gives combine(y, y), as one does of the two halves of its rows. Each sum has the order of its row's
    columns: a row's bits depend neither on how many rows there are, nor on the others, nor on `width`.

    width: how many rows of x a product takes, 16 or a multiple of 32 up to 256; by default what `_width` finds. Raises
    NotImplementedError for what `beyond` names, ValueError for what does not fit together.
    """
    for weights in sets:
        _check(x, weights, combine, 3)
    if why := beyond([w for weights in sets for w in weights]):
        raise NotImplementedError(f"grouped: {why}")
    if len({len(weights) for weights in sets}) > 1:
        raise ValueError(f"sets of {[len(weights) for weights in sets]} weights are not alike")
    if width is not None and ((width != 16 and width % PIECE) or width > COLUMNS):
        raise ValueError(f"{width=} is neither 16 nor a multiple of {PIECE} up to {COLUMNS}")
    m, made = len(x), [_Set.of(weights, combine, x.dtype, interpret) for weights in sets]
    if isinstance(sets[0][0], Packed):
        x = permuted(x)
    width = width or _width(m, sum(one.spans for one in made), ctas)
    x = jnp.pad(x, ((0, max(width - m, -m % 8)), (0, 0)))  # copies are of rows by 8
    options = {"tile": width, "widths": (width,), "combine": combine, "dtype": dtype, "permute": False}
    ys = _launch(x, made, layer, None, [()] * len(made), **options, ctas=ctas, interpret=interpret)
    return tuple(y[:m] for y in ys)


def _width(rows: int, spans: int, ctas: int) -> int:
    """Which number of rows at once takes the least time, as CTAs go through items of so many times so many spans.

    An item takes as long as its products, but not less than it takes to decode its weights, and some time to begin
    and to end.
    """

    def time(width: int) -> tuple[int, int]:
        items = -(-rows // width)
        return -(-items * spans // ctas) * (max(width, DECODING) + ENDS), items

    return min((16, *range(PIECE, COLUMNS + 1, PIECE)), key=time)


@dataclass(frozen=True)
class _Set:
    """The weights of a result: one, of which a warpgroup has other rows than the next, or two with the same rows."""

    sources: list[Any]
    height: int  # rows of the result
    step: int  # of these a CTA makes at once
    apart: int  # rows of a weight from a warpgroup's to those of the next

    @classmethod
    def of(cls, weights: Sequence[Any], combine: Any, dtype: Any, interpret: bool) -> "_Set":
        sources = [(_Codes if isinstance(w, Packed) else _Plain)(w, dtype, interpret) for w in weights]
        rows = weights[0].shape[-2]
        if combine is None:
            return cls(sources, rows, COMPUTING * ROWS, ROWS)
        height = rows * len(weights) // COMPUTING
        return cls(sources, height, ROWS, rows - height)

    @property
    def spans(self) -> int:
        return -(-self.height // self.step)

    @property
    def ring(self) -> str:
        """What is alike where sets have their codes in the same memory."""
        return ", ".join(one.name for one in self.sources)

    def which(self, wg: int) -> int:
        """The source of a warpgroup."""
        return wg % len(self.sources)

    @property
    def bytes(self) -> int:
        """Of a step."""
        return sum(self.sources[self.which(wg)].bytes for wg in range(COMPUTING))

    @property
    def copies(self) -> int:
        return sum(self.sources[self.which(wg)].copies for wg in range(COMPUTING))

    def room(self, steps: int) -> list[Any]:
        return [one.room(steps * COMPUTING // len(self.sources)) for one in self.sources]

    def slot(self, smem: Sequence[Any], to: Any, which: int, wg: Any) -> Any:
        """Where a warpgroup's rows of a step are in that room."""
        return self.sources[which].slot(smem[which], to if len(self.sources) > 1 else to * COMPUTING + wg)


def _launch(
    x: Array,
    sets: Sequence[_Set],
    layer: Index,
    items: Items | None,
    biases: Sequence[Sequence[Array]],
    *,
    tile: int,
    widths: tuple[int, ...],
    combine: Callable[..., Array] | None,
    dtype: DTypeLike,
    permute: bool,
    ctas: int,
    interpret: bool,
) -> tuple[Array, ...]:
    """The products of x with each set. Without `items` all rows are one expert's, taken a tile at a time."""
    n, source, most = len(x), sets[0].sources[0], widths[-1]
    packed, steps, per = isinstance(source, _Codes), source.steps, source.chunks
    spans, experts = sum(one.spans for one in sets), 1 if items is None else source.w.shape[1]
    count = -(-n // most) if items is None else len(items.expert)
    ctas = min(count * spans, ctas)
    parts = 1 if combine is None else COMPUTING  # of a result, that warpgroups have
    piece, out_size = math.gcd(tile, PIECE, most // parts), jnp.dtype(dtype).itemsize
    rings = {one.ring: one for one in sets}
    room = SHARED - COMPUTING * piece * ROWS * (OUTS * out_size + 4 * (parts - 1))
    x_bytes, w_bytes = most * CHUNK * x.dtype.itemsize, sum(one.bytes for one in rings.values())
    w_stages = room // (x_bytes + w_bytes)
    if packed:  # steps of few columns are done soon: more of them have to be on their way
        w_stages = 2 if most > ROWS else max(2, min(4, (room - 8 * x_bytes) // w_bytes))
    x_stages = min((room - w_stages * w_bytes) // x_bytes, 8)

    def grouped_product(x_gmem, weights_gmem, biases_gmem, layer_gmem, items_gmem, *rest):
        *outs_gmem, x_smem, w_smem, out_smem, x_full, x_free, w_full, w_free, spare_smem, met, left_smem = rest
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        free = [(x_free, x_stages), *((one, w_stages) for one in w_free.values())]

        def over_items(one_item: Callable[..., None]) -> None:
            """one_item(set, rows of x, the first of them, entry of the stack, its first row, steps before) for all."""
            number, before = count if items_gmem is None else items_gmem.starts[experts], 0
            for s, one in enumerate(sets):  # a loop for each: several in one would need more registers

                def visit(i: Array, _: None, s: int = s, one: _Set = one, before: int = before) -> None:
                    mine, entry = i * ctas + cta - before, layer_gmem[0]
                    if items_gmem is None:  # CTAs that run together share what they can of the weights
                        span, token = lax.div(mine, count), lax.rem(mine, count) * most
                        rows = jnp.minimum(n - token, most)
                    else:
                        item, span = lax.div(mine, spans), lax.rem(mine, spans)
                        entry = entry * experts + items_gmem.expert[item]
                        rows, token = items_gmem.tiles[item] * tile, items_gmem.first[item] * tile
                    one_item(s, rows, token, entry, span * one.step, i * steps)

                after = before + number * one.spans
                first, last = (lax.div(at + (ctas - 1) - cta, ctas) for at in (before, after))
                lax.fori_loop(first, last, visit, None)
                before = after

        def by_width(rows: Any, do: Callable[[int], None], among: tuple[int, ...] = widths) -> None:
            """do(width) for the least width that is enough."""
            if half := len(among) // 2:
                few, many = (partial(by_width, rows, do, some) for some in (among[:half], among[half:]))
                lax.cond(rows <= among[half - 1], few, many)
            else:
                do(among[0])

        def produce() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="decrease")

            def one_item(s: int, rows: Array, token: Array, entry: Array, row: Array, done: Array) -> None:
                one, ring = sets[s], sets[s].ring

                def step(i: Array, _: None) -> None:
                    to = lax.rem(done + i, w_stages)
                    plgpu.barrier_wait(w_free[ring].at[to])
                    for group in range(COMPUTING):
                        which = one.which(group)
                        here, full = one.slot(w_smem[ring], to, which, group), w_full[ring].at[to]
                        gmem, mine = weights_gmem[s][which], row + group * one.apart
                        one.sources[which].copy(gmem, here, full, entry, mine, i)
                    for c in range(per):
                        to = lax.rem((done + i) * per + c, x_stages)
                        plgpu.barrier_wait(x_free.at[to])
                        columns = pl.ds(source.start(i) + c * CHUNK, CHUNK)

                        def copy(most: int, to: Array = to, columns: Any = columns) -> None:
                            here = x_smem.at[to, pl.ds(0, most)]
                            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(token, most), columns], here, x_full.at[to])

                        by_width(rows, copy)

                lax.fori_loop(0, steps, step, None)

            over_items(one_item)
            for ring, stages in free:
                for stage in range(stages):  # nothing may still arrive when the kernel ends
                    plgpu.barrier_wait(ring.at[stage])

        def compute() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="increase")
            for ring, stages in free:
                for stage in range(stages):
                    plgpu.barrier_arrive(ring.at[stage])

            def one_item(which: int, s: int, rows: Array, token: Array, entry: Array, row: Array, done: Array) -> None:
                one, ring, source = sets[s], sets[s].ring, sets[s].sources[which]
                mine = row + wg * one.apart

                def release(i: Any, c: int) -> None:
                    chunk = (done + i) * per + c
                    plgpu.barrier_arrive(x_free.at[lax.rem(chunk, x_stages)])
                    if not packed:
                        plgpu.barrier_arrive(w_free[ring].at[lax.rem(chunk, w_stages)])

                def decoded(operand: Callable[[int], Array], c: int) -> Any:
                    left = operand(c)
                    plgpu.wgmma_wait(0)  # a product whose left operand is in registers runs alone
                    if not interpret:
                        return left
                    left_smem[wg] = left  # from where the interpreter multiplies
                    plgpu.commit_smem()
                    return left_smem.at[wg]

                def products(acc: Any) -> Array:
                    gmem = weights_gmem[s][which]

                    def numbers_of(i: Any) -> list[Array]:
                        """A step's scales, a step before; many columns leave no registers for them, nor a wait."""
                        return source.numbers(gmem, entry, mine, i) if most <= COLUMNS // 2 else []

                    def step(i: Array, numbers: list[Array]) -> list[Array]:
                        following = numbers_of(i + 1)
                        to = lax.rem(done + i, w_stages)
                        plgpu.barrier_wait(w_full[ring].at[to])
                        codes = one.slot(w_smem[ring], to, which, wg)
                        operand = source.operands(gmem, codes, entry, mine, i, numbers)
                        for c in range(per):
                            slot = lax.rem((done + i) * per + c, x_stages)
                            left = decoded(operand, c) if packed else operand
                            plgpu.barrier_wait(x_full.at[slot])

                            def multiply(most: int, left: Any = left, slot: Array = slot) -> None:
                                columns = pl.ds(0, most)
                                plgpu.wgmma(acc.at[:, columns], left, x_smem.at[slot, columns].T)

                            by_width(rows, multiply)
                            if not packed:
                                plgpu.wgmma_wait(1)
                            # The products of the chunk before are done.
                            when(i > 0, partial(release, i, -1)) if c == 0 else release(i, c - 1)
                        if packed:
                            plgpu.commit_smem()  # all codes are read that the next copy overwrites
                            plgpu.barrier_arrive(w_free[ring].at[to])
                        return following

                    lax.fori_loop(0, steps, step, numbers_of(jnp.int32(0)))
                    return acc[...]

                y = pl.run_scoped(products, ACC((ROWS, most)))
                release(steps, -1)
                bias = source.bias(biases_gmem[s][which], entry, mine) if biases[s] else None

                def columns(first: int) -> Array:
                    part = lax.slice(y, (0, first), (ROWS, first + piece))
                    return part if bias is None else part + lax.broadcast_in_dim(bias, part.shape, [0])

                def store(first: Any, k: int, y: Array) -> None:
                    here = out_smem.at[wg * OUTS + k % OUTS]
                    plgpu.wait_smem_to_gmem(OUTS - 1 if k else 0, wait_read_only=True)
                    y = plgpu.layout_cast(y.astype(dtype), TURNED)
                    here.T[...] = registers.permute_rows(y, interpret=interpret) if permute else y
                    plgpu.commit_smem()
                    to = pl.ds(token + first, piece), pl.ds(mine if combine is None else row, ROWS)
                    plgpu.copy_smem_to_gmem(here, outs_gmem[s].at[to])

                def meet() -> None:
                    plgpu.barrier_arrive(met)
                    plgpu.barrier_wait(met)

                def finish(first: int, k: int) -> None:
                    store(first, k, columns(first))

                def exchange(side: int, first: int, k: int) -> None:
                    """The gate's warpgroup finishes the first of two pieces, the other one the second."""
                    assert combine
                    mine, given = first + side * piece, first + (1 - side) * piece
                    spare_smem[side] = columns(given)
                    meet()
                    both = [columns(mine), plgpu.load(spare_smem.at[1 - side], layout=plgpu.Layout.WGMMA)]
                    meet()
                    y = combine(*both[:: 1 - 2 * side])
                    when(mine < rows, partial(store, mine, k, y))

                def end(do: Callable[[int, int], None]) -> None:
                    for k, first in enumerate(range(0, most, parts * piece)):
                        when(first < rows, partial(do, first, k))

                if combine is None:
                    end(finish)
                elif len(one.sources) > 1:
                    end(partial(exchange, which))
                else:
                    for side in range(COMPUTING):
                        when(wg == side, partial(end, partial(exchange, side)))

            for which in range(len(sets[0].sources)):
                when(len(sets[0].sources) == 1 or wg == which, partial(over_items, partial(one_item, which)))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        when(wg == COMPUTING, produce)
        when(wg < COMPUTING, compute)

    def barriers(stages: int, arrivals: int) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)

    return plgpu.kernel(
        grouped_product,
        out_type=tuple(jax.ShapeDtypeStruct((n, one.height), dtype) for one in sets),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=COMPUTING + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((x_stages, most, CHUNK), x.dtype, transforms=tiled(CHUNK)),
            {ring: one.room(w_stages) for ring, one in rings.items()},
            plgpu.SMEM((COMPUTING * OUTS, piece, ROWS), dtype, transforms=tiled(ROWS, bits=8 * out_size)),
            barriers(x_stages, 1),
            barriers(x_stages, COMPUTING),
            {ring: barriers(w_stages, one.copies) for ring, one in rings.items()},
            {ring: barriers(w_stages, COMPUTING) for ring in rings},
            plgpu.SMEM((COMPUTING, ROWS, piece), jnp.float32, transforms=tiled(piece, bits=32)) if combine else None,
            barriers(1, COMPUTING),
            plgpu.SMEM((COMPUTING, ROWS, CHUNK), x.dtype, transforms=tiled(CHUNK)) if packed and interpret else None,
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(
        x,
        [[one.planes for one in some.sources] for some in sets],
        [[b.reshape(-1, b.shape[-1]) for b in some] for some in biases],
        jnp.asarray(layer, jnp.int32).reshape(1),
        items,
    )


def _check(x: Any, weights: Any, combine: Any, axes: int) -> None:
    shape, parts = weights[0].shape, 1 if combine is None else 2
    if any(w.shape != shape or w.ndim != axes for w in weights) or x.shape[1] != shape[-1]:
        raise ValueError(f"{[w.shape for w in weights]} are not alike, of {axes} axes, for x of {x.shape}")
    if len(weights) not in (1, parts):
        raise ValueError(f"{len(weights)} weights make no product of {parts} parts")
    if why := beyond(weights, parts // len(weights)):
        raise NotImplementedError(f"grouped: {why}")
    for w in weights:
        if x.dtype not in ((jnp.bfloat16, jnp.float16) if isinstance(w, Packed) else (w.dtype,)):
            raise ValueError(f"x is of {x.dtype}, a weight of {w.format.name if isinstance(w, Packed) else w.dtype}")


@dataclass(frozen=True)
class _Source:
    """A stack [..., F, D]."""

    w: Any
    dtype: Any
    interpret: bool

    @property
    def name(self) -> str:
        return self.w.format.name if isinstance(self.w, Packed) else str(self.w.dtype)

    def block(self, entry: Any, row: Any) -> Any:
        """Which 64 rows of all; those beyond a weight's last are not stored, and may be any."""
        blocks = self.w.shape[-2] // ROWS
        return entry * blocks + jnp.minimum(lax.div(row, ROWS), blocks - 1)

    def bias(self, gmem: Any, entry: Any, row: Any) -> Float[Array, "64"]:
        blocks = self.w.shape[-2] // ROWS
        block = self.block(entry, row)
        here = gmem.at[lax.div(block, blocks), pl.ds(lax.rem(block, blocks) * ROWS, ROWS)]
        return plgpu.load(here, layout=ROW, optimized=False).astype(jnp.float32)


class _Plain(_Source):
    """Products take 64 elements of a row at a time, from shared memory."""

    chunks = copies = 1

    @property
    def planes(self) -> Array:
        return self.w.reshape(-1, *self.w.shape[-2:])

    @property
    def steps(self) -> int:
        return self.w.shape[-1] // CHUNK

    @property
    def bytes(self) -> int:
        return ROWS * CHUNK * self.w.dtype.itemsize

    def start(self, i: Any) -> Any:
        return i * CHUNK

    def room(self, count: int) -> Any:
        return plgpu.SMEM((count, ROWS, CHUNK), self.w.dtype, transforms=tiled(CHUNK))

    def slot(self, smem: Any, to: Any) -> Any:
        return smem.at[to]

    def copy(self, gmem: Any, smem: Any, full: Any, entry: Any, row: Any, i: Any) -> None:
        here = gmem.at[entry, pl.ds(row, ROWS), pl.ds(self.start(i), CHUNK)]
        plgpu.copy_gmem_to_smem(here, smem, full)

    def numbers(self, gmem: Any, entry: Any, row: Any, i: Any) -> list[Array]:
        return []

    def operands(self, gmem: Any, smem: Any, entry: Any, row: Any, i: Any, numbers: list[Array]) -> Any:
        return smem


class _Codes(_Source):
    """256 elements of a row are decoded at a time; the last begin with some that are done."""

    chunks = UNIT // CHUNK

    @property
    def tile(self) -> Tile:
        return TILES[self.w.format.name]

    @property
    def planes(self) -> dict[str, Array]:
        return units.views(self.w, units.TALL)

    @property
    def steps(self) -> int:
        return -(-self.w.shape[-1] // UNIT)

    @property
    def bytes(self) -> int:
        return ROWS * sum(size for _, size in self.tile.codes)

    @property
    def copies(self) -> int:
        return len(self.tile.codes)

    def start(self, i: Any) -> Any:
        return jnp.minimum(i * UNIT, self.w.shape[-1] - UNIT)

    def _at(self, entry: Any, row: Any, i: Any) -> tuple[Any, Any]:
        return self.block(entry, row), lax.div(self.start(i), RUN)

    def room(self, count: int) -> dict[str, Any]:
        return units.room(self.w, units.TALL, count)

    def slot(self, smem: dict[str, Any], to: Any) -> dict[str, Any]:
        return {name: ref.at[to] for name, ref in smem.items()}

    def copy(self, gmem: Any, smem: Any, full: Any, entry: Any, row: Any, i: Any) -> None:
        units.copy(gmem, smem, full, self.w.format, units.TALL, *self._at(entry, row, i))

    def _unit(self, gmem: Any, entry: Any, row: Any, i: Any, found: Sequence[Array] = ()) -> units.Loaded:
        place = self._at(entry, row, i)
        return units.Loaded(gmem, self.w.format, units.TALL, *place, found=found, interpret=self.interpret)

    def numbers(self, gmem: Any, entry: Any, row: Any, i: Any) -> list[Array]:
        """What the scales and offsets of a step are made of."""
        return self._unit(gmem, entry, row, i).numbers()

    def operands(
        self, gmem: Any, smem: Any, entry: Any, row: Any, i: Any, numbers: list[Array]
    ) -> Callable[[int], Array]:
        """Each 64 elements of the 64 rows, as values."""
        unit = self._unit(gmem, entry, row, i, numbers)
        unit.take(smem)
        narrow = self.tile.group == 16

        @cache
        def affine(half: int) -> tuple[Array, Array | None]:
            found = self.tile.affine(unit, half)
            if self.w.shape[-1] % UNIT == 0:
                return found
            column = plgpu.broadcasted_iota(jnp.int32, (16, 4, 8), 2, layout=SUMS)
            run = lax.div(self.start(i), RUN) + 4 * (column & 1) + (column >> 1)
            return jax.tree.map(lambda a: jnp.where(run < i * (UNIT // RUN), 0.0, a), found)

        def operand(c: int) -> Array:
            of = range(4 * c, 4 * c + 4)  # of 16 times 16 elements
            return registers.operand(
                tuple(self.tile.values(unit, j) for j in of),
                *affine(c // 2 if narrow else 0),
                tuple(j % 8 if narrow else j // 2 for j in of),
                signed=SIGNED.get(self.w.format.name, 0),
                dtype=self.dtype,
                interpret=self.interpret,
            )

        return operand
