"""Products of rows that are grouped by expert with each expert's own weight, on Hopper (MegaBlocks, arXiv:2211.15841).

The product is transposed: a weight's rows are the 64 of the tensor cores' product, and rows of x its columns, of which
there may be few. Two warpgroups multiply, each 64 rows of every weight; a third one copies ahead of them, also across
groups of rows. Packed weights are decoded into the registers that a product takes its left operand from, while the one
before it runs; a value is decoded once for up to 256 rows of x.
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
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxinfer.pallas import registers, units
from jaxinfer.pallas.limbs import RUN
from jaxinfer.pallas.registers import PERMUTED, SUMS, TURNED, tiled
from jaxinfer.pallas.tiles import TILES, UNIT, Tile
from jaxinfer.quants import Packed, Weight, at, dense
from jaxinfer.tree import Index

ROWS, CHUNK = 64, 64  # of a product; elements of a row of x that are copied at once
COMPUTING = 2  # warpgroups
COLUMNS = 256  # of a warpgroup's sums, which are half of its registers then
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
    """Each 16 columns of x in the order that products with packed weights take."""
    return x.reshape(*x.shape[:-1], -1, len(PERMUTED))[..., np.array(PERMUTED)].reshape(x.shape)


def reference(
    x: Float[Array, "N D"],
    weights: Sequence[Weight],
    layer: Index,
    expert_of_tile: Int[Array, " n_tiles"],
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

    return lax.map(one, (x.reshape(-1, tile, x.shape[1]), expert_of_tile)).reshape(len(x), -1)


class Items(NamedTuple):
    """What CTAs share: runs of tiles of one expert, as many as a product takes at once."""

    expert: Int[Array, " n"]
    first: Int[Array, " n"]  # its first tile
    tiles: Int[Array, " n"]  # how many
    number: Int[Array, "1"]  # of items; what lies behind them means nothing


def items_of(expert_of_tile: Int[Array, " n"], experts: int, most: int) -> Items:
    """Up to `most` tiles of an expert are an item. Sums over pairs of tiles are fewer launches than scans."""
    e, i = expert_of_tile, jnp.arange(len(expert_of_tile), dtype=jnp.int32)
    same, before = e[:, None] == e, i < i[:, None]
    rank, size = (same & before).sum(1, dtype=jnp.int32), same.sum(1, dtype=jnp.int32)
    head = (e >= 0) & (e < experts) & (rank % most == 0)
    place = jnp.where(head, (head & before).sum(1, dtype=jnp.int32), -1)
    here = place == i[:, None]
    one, first, tiles = (jnp.where(here, a, 0).sum(1, dtype=jnp.int32) for a in (e, i, jnp.minimum(size - rank, most)))
    return Items(one, first, tiles, head.sum(dtype=jnp.int32).reshape(1))


@partial(jax.jit, static_argnames=("tile", "combine", "dtype", "permute", "widths", "ctas", "interpret"))
def grouped(
    x: Float[Array, "N D"],
    weights: Sequence[Weight],
    layer: Index,
    expert_of_tile: Int[Array, " n_tiles"],
    *,
    tile: int,
    biases: Sequence[Float[Array, "R E _"]] | None = None,
    combine: Callable[..., Array] | None = None,
    dtype: DTypeLike,
    permute: bool = False,
    widths: tuple[int, ...] | None = None,
    ctas: int = PROCESSORS,
    interpret: bool = False,
) -> Float[Array, "N F"]:
    """y = w[layer, e] x + bias[layer, e] for each tile of rows of x and its expert e, summed in f32.

    Of two weights [R, E, F, D], or of the two halves of the rows of one, it is combine(y, y). Where weights are packed,
    x has to be `permuted`; with `permute` the result is. Tiles of an expert follow one another. Those whose expert is
    none of 0 to E - 1 cost nothing, and their rows of the result are not defined. A row's bits depend neither on the
    other rows nor on `tile` and `widths`.

    widths: how many rows of x a product takes: the fewest that hold an expert's tiles, or the most. ctas: that share
    the work. Raises NotImplementedError for what `beyond` names, ValueError for what does not fit together.
    """
    _check(x, weights, expert_of_tile, tile, biases, combine, dtype, permute)
    n = len(x)
    experts, height = weights[0].shape[1:3]
    packed = isinstance(weights[0], Packed)
    offsets = [0] * len(weights)
    if combine is not None and len(weights) == 1:
        weights, height = [weights[0]] * 2, height // 2
        biases, offsets = biases and [biases[0]] * 2, [0, height]
    source = [
        (_Codes if packed else _Plain)(w, first, x.dtype, interpret) for w, first in zip(weights, offsets, strict=True)
    ]
    steps, per = source[0].steps, source[0].chunks
    widths = widths or tuple(range(ROWS, COLUMNS // len(weights) + 1, ROWS))
    if tile % 16 or widths[-1] % tile:
        raise ValueError(f"{tile=} is no multiple of 16 that divides {widths[-1]}")
    items = items_of(expert_of_tile, experts, widths[-1] // tile)
    spans = -(-height // (COMPUTING * ROWS))
    ctas = min(len(expert_of_tile) * spans, ctas)
    piece, out_size = math.gcd(tile, PIECE), jnp.dtype(dtype).itemsize
    room = SHARED - COMPUTING * OUTS * piece * ROWS * out_size
    x_bytes, w_bytes = widths[-1] * CHUNK * x.dtype.itemsize, COMPUTING * sum(s.bytes for s in source)
    w_stages = 2 if packed else room // (x_bytes + w_bytes)
    x_stages = min((room - w_stages * w_bytes) // x_bytes, 8)

    def grouped_product(x_gmem, weights_gmem, biases_gmem, layer_gmem, items_gmem, out_gmem, *scratch):
        x_smem, w_smem, out_smem, x_full, x_free, w_full, w_free, left_smem = scratch
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        rings = (x_free, x_stages), (w_free, w_stages)

        def over_items(one_item: Callable[..., None]) -> None:
            """one_item(rows of x, the first of them, entry of the stack, its first row, steps before) for this CTA."""
            mine = lax.div(items_gmem.number[0] * spans + (ctas - 1) - cta, ctas)

            def visit(i: Array, _: None) -> None:
                item, span = lax.div(i * ctas + cta, spans), lax.rem(i * ctas + cta, spans)
                entry = layer_gmem[0] * experts + items_gmem.expert[item]
                rows, token = items_gmem.tiles[item] * tile, items_gmem.first[item] * tile
                one_item(rows, token, entry, span * COMPUTING * ROWS, i * steps)

            lax.fori_loop(0, mine, visit, None)

        def by_width(rows: Any, do: Callable[[int], None], among: tuple[int, ...] = widths) -> None:
            """do(width) for the least width that is enough."""
            if half := len(among) // 2:
                few, many = (partial(by_width, rows, do, some) for some in (among[:half], among[half:]))
                lax.cond(rows <= among[half - 1], few, many)
            else:
                do(among[0])

        def produce() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="decrease")

            def one_item(rows: Array, token: Array, entry: Array, row: Array, done: Array) -> None:
                def step(i: Array, _: None) -> None:
                    to = lax.rem(done + i, w_stages)
                    plgpu.barrier_wait(w_free.at[to])
                    for one, gmem, smem in zip(source, weights_gmem, w_smem, strict=True):
                        for group in range(COMPUTING):
                            here = one.slot(smem, to * COMPUTING + group)
                            one.copy(gmem, here, w_full.at[to], entry, row + group * ROWS, i)
                    for c in range(per):
                        to = lax.rem((done + i) * per + c, x_stages)
                        plgpu.barrier_wait(x_free.at[to])
                        columns = pl.ds(source[0].start(i) + c * CHUNK, CHUNK)

                        def copy(most: int, to: Array = to, columns: Any = columns) -> None:
                            here = x_smem.at[to, pl.ds(0, most)]
                            plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(token, most), columns], here, x_full.at[to])

                        by_width(rows, copy)

                lax.fori_loop(0, steps, step, None)

            over_items(one_item)
            for free, stages in rings:
                for s in range(stages):  # nothing may still arrive when the kernel ends
                    plgpu.barrier_wait(free.at[s])

        def compute() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="increase")
            for free, stages in rings:
                for s in range(stages):
                    plgpu.barrier_arrive(free.at[s])

            def one_item(rows: Array, token: Array, entry: Array, row: Array, done: Array) -> None:
                row = row + wg * ROWS

                def release(i: Any, c: int) -> None:
                    chunk = (done + i) * per + c
                    plgpu.barrier_arrive(x_free.at[lax.rem(chunk, x_stages)])
                    if not packed:
                        plgpu.barrier_arrive(w_free.at[lax.rem(chunk, w_stages)])

                def products(*accs: Any) -> list[Array]:
                    def step(i: Array, _: None) -> None:
                        to = lax.rem(done + i, w_stages)
                        plgpu.barrier_wait(w_full.at[to])
                        operands = [
                            one.operands(gmem, one.slot(smem, to * COMPUTING + wg), entry, row, i)
                            for one, gmem, smem in zip(source, weights_gmem, w_smem, strict=True)
                        ]
                        for c in range(per):
                            slot = lax.rem((done + i) * per + c, x_stages)

                            def multiply(lefts: Sequence[tuple], most: int, slot: Array = slot) -> None:
                                for acc, left in lefts:
                                    columns = pl.ds(0, most)
                                    plgpu.wgmma(acc.at[:, columns], left, x_smem.at[slot, columns].T)

                            def decoded(operand: Callable[[int], Array], c: int = c) -> Any:
                                left = operand(c)
                                plgpu.wgmma_wait(0)  # a product whose left operand is in registers runs alone
                                if not interpret:
                                    return left
                                left_smem[wg] = left  # from where the interpreter multiplies
                                plgpu.commit_smem()
                                return left_smem.at[wg]

                            pairs = list(zip(accs, operands, strict=True))
                            if packed:
                                for b, (acc, operand) in enumerate(pairs):
                                    left = decoded(operand)
                                    if b == 0:
                                        plgpu.barrier_wait(x_full.at[slot])
                                    by_width(rows, partial(multiply, [(acc, left)]))
                            else:
                                plgpu.barrier_wait(x_full.at[slot])
                                by_width(rows, partial(multiply, pairs))
                                plgpu.wgmma_wait(len(accs))
                            # The products of the chunk before are done.
                            pl.when(i > 0)(partial(release, i, -1)) if c == 0 else release(i, c - 1)
                        if packed:
                            plgpu.commit_smem()  # all codes are read that the next copy overwrites
                            plgpu.barrier_arrive(w_free.at[to])

                    lax.fori_loop(0, steps, step, None)
                    return [acc[...] for acc in accs]

                ys = pl.run_scoped(products, *(ACC((ROWS, widths[-1])) for _ in source))
                release(steps, -1)
                bias = [one.bias(gmem, entry, row) for one, gmem in zip(source, biases_gmem or (), strict=False)]

                def store(first: int) -> None:
                    part = [lax.slice(y, (0, first), (ROWS, first + piece)) for y in ys]
                    if bias:
                        part = [y + lax.broadcast_in_dim(b, y.shape, [0]) for y, b in zip(part, bias, strict=True)]
                    y = part[0] if combine is None else combine(*part)
                    here = out_smem.at[wg * OUTS + first // piece % OUTS]
                    plgpu.wait_smem_to_gmem(OUTS - 1 if first else 0, wait_read_only=True)
                    y = plgpu.layout_cast(y.astype(dtype), TURNED)
                    here.T[...] = registers.permute_rows(y, interpret=interpret) if permute else y
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(here, out_gmem.at[pl.ds(token + first, piece), pl.ds(row, ROWS)])

                for first in range(0, widths[-1], piece):
                    pl.when(first < rows)(partial(store, first))

            over_items(one_item)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.when(wg == COMPUTING)(produce)
        pl.when(wg < COMPUTING)(compute)

    return plgpu.kernel(
        grouped_product,
        out_type=jax.ShapeDtypeStruct((n, height), dtype),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=COMPUTING + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((x_stages, widths[-1], CHUNK), x.dtype, transforms=tiled(CHUNK)),
            [s.room(w_stages * COMPUTING) for s in source],
            plgpu.SMEM((COMPUTING * OUTS, piece, ROWS), dtype, transforms=tiled(ROWS, bits=8 * out_size)),
            plgpu.Barrier(num_barriers=x_stages),
            plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=x_stages),
            plgpu.Barrier(num_arrivals=COMPUTING * sum(s.copies for s in source), num_barriers=w_stages),
            plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=w_stages),
            plgpu.SMEM((COMPUTING, ROWS, CHUNK), x.dtype, transforms=tiled(CHUNK)) if packed and interpret else None,
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(
        x,
        [s.planes for s in source],
        biases and [b.reshape(-1, b.shape[2]) for b in biases],
        jnp.asarray(layer, jnp.int32).reshape(1),
        items,
    )


def _check(
    x: Any, weights: Any, expert_of_tile: Any, tile: int, biases: Any, combine: Any, dtype: Any, permute: bool
) -> None:
    shape, parts = weights[0].shape, 1 if combine is None else 2
    if any(w.shape != shape for w in weights) or x.shape[1] != shape[3] or len(weights) not in (1, parts):
        raise ValueError(f"{x.shape} and {[w.shape for w in weights]} make no product of {parts} parts")
    if why := beyond(weights, parts // len(weights)):
        raise NotImplementedError(f"grouped: {why}")
    for w in weights:
        if x.dtype not in ((jnp.bfloat16, jnp.float16) if isinstance(w, Packed) else (w.dtype,)):
            raise ValueError(f"x is of {x.dtype}, a weight of {w.format.name if isinstance(w, Packed) else w.dtype}")
    if len(x) != len(expert_of_tile) * tile:
        raise ValueError(f"{len(x)} rows are not {len(expert_of_tile)} tiles of {tile}")
    if permute and jnp.dtype(dtype).itemsize != 2:
        raise ValueError(f"results of {jnp.dtype(dtype)} are not permuted")


@dataclass(frozen=True)
class _Source:
    """A stack, or half of its rows, from `first` on."""

    w: Any
    first: int
    dtype: Any
    interpret: bool

    def block(self, entry: Any, row: Any) -> Any:
        """Which 64 rows of all; those beyond a weight's last are not stored, and may be any."""
        blocks = self.w.shape[2] // ROWS
        return entry * blocks + jnp.minimum(lax.div(self.first + row, ROWS), blocks - 1)

    def bias(self, gmem: Any, entry: Any, row: Any) -> Float[Array, "64"]:
        blocks = self.w.shape[2] // ROWS
        block = self.block(entry, row)
        here = gmem.at[lax.div(block, blocks), pl.ds(lax.rem(block, blocks) * ROWS, ROWS)]
        return plgpu.load(here, layout=ROW, optimized=False).astype(jnp.float32)


class _Plain(_Source):
    """Products take 64 elements of a row at a time, from shared memory."""

    chunks = copies = 1

    @property
    def planes(self) -> Array:
        return self.w.reshape(-1, *self.w.shape[2:])

    @property
    def steps(self) -> int:
        return self.w.shape[3] // CHUNK

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
        here = gmem.at[entry, pl.ds(self.first + row, ROWS), pl.ds(self.start(i), CHUNK)]
        plgpu.copy_gmem_to_smem(here, smem, full)

    def operands(self, gmem: Any, smem: Any, entry: Any, row: Any, i: Any) -> Any:
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
        return -(-self.w.shape[3] // UNIT)

    @property
    def bytes(self) -> int:
        return ROWS * sum(size for _, size in self.tile.codes)

    @property
    def copies(self) -> int:
        return len(self.tile.codes)

    def start(self, i: Any) -> Any:
        return jnp.minimum(i * UNIT, self.w.shape[3] - UNIT)

    def _at(self, entry: Any, row: Any, i: Any) -> tuple[Any, Any]:
        return self.block(entry, row), lax.div(self.start(i), RUN)

    def room(self, count: int) -> dict[str, Any]:
        return units.room(self.w, units.TALL, count)

    def slot(self, smem: dict[str, Any], to: Any) -> dict[str, Any]:
        return {name: ref.at[to] for name, ref in smem.items()}

    def copy(self, gmem: Any, smem: Any, full: Any, entry: Any, row: Any, i: Any) -> None:
        units.copy(gmem, smem, full, self.w.format, units.TALL, *self._at(entry, row, i))

    def operands(self, gmem: Any, smem: Any, entry: Any, row: Any, i: Any) -> Callable[[int], Array]:
        """Each 64 elements of the 64 rows, as values."""
        unit = units.Loaded(gmem, self.w.format, units.TALL, *self._at(entry, row, i), interpret=self.interpret)
        unit.take(smem)
        narrow = self.tile.group == 16

        @cache
        def affine(half: int) -> tuple[Array, Array | None]:
            found = self.tile.affine(unit, half)
            if self.w.shape[3] % UNIT == 0:
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
