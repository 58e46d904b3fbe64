"""The attention that keys get from a prompt's last queries, on Hopper, without a matrix of it in device memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.tree import Index

ROWS = 64  # of one warpgroup's product
SPAN = 1024  # keys of a CTA, whatever the batch is: a row's bits are its own
LOG2E = math.log2(math.e)
LOWEST = -1e30  # a softmax's maximum before any key: finite, so that no weight is nan
FAR = jnp.iinfo(jnp.int32).max  # the position of an empty slot: no query sees it
# Registers of a thread that computes and of one that copies, by the number of warpgroups that compute: together what
# they have from the start, which is 168, 128 and 96 each. One that computes alone has enough.
REGISTERS = {2: (232, 40), 3: (152, 56), 4: (112, 32)}
BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    window: W in whole groups of 8, as products want it. heads: query heads of a CTA, whose two parts take 128 KiB.
    keys: of a block of the first pass; one of the second has ROWS. wide: columns of K that are copied at a time.
    """

    window: int
    heads: int
    keys: int
    wide: int

    @property
    def rows(self) -> int:
        return -(-self.heads * self.window // ROWS) * ROWS


def beyond(window: int, width: int, dtype: Any) -> str | None:
    """Why these kernels do not take a window of queries and keys of this width and type; None where they do."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"keys of {jnp.dtype(dtype).name} are neither bfloat16 nor float16"
    if width % 16 or (width > 256 and width != 512):
        return f"heads of {width} are neither a multiple of 16 up to 256 nor 512"
    if window > (most := _most_rows(width)):
        return f"a window of {window} queries is over {most}, of heads of {width}"
    return None


def blocks_for(window: int, group: int, width: int) -> Blocks:
    window = -(-window // 8) * 8
    most = _most_rows(width) // window
    heads = -(-group // -(-group // most))  # as few tiles as can be, as even as can be
    return Blocks(window, heads, keys=128 if width <= 128 else 64, wide=min(width, 256))


def _most_rows(width: int) -> int:
    return min(256, 2**15 // width // ROWS * ROWS)


def votes(
    queries: Float[Array, "B W K G H"],
    valid: Bool[Array, "B W"],
    k: Float[Array, "R B K S H"],
    layer: Index,
    pos: Int[Array, "B P S"],
    sinks: Float[Array, " N"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B K G S"]:
    """`ops.votes.votes_reference` in two passes over K, which is bf16 or f16 and read where it lies in its stack.

    The first takes each query's log-sum-exp over spans of keys, as flash attention does (arXiv:2307.08691, section
    3.1), and these are joined. The second computes the scores again, keys as rows, and sums each key's weights over
    the window. Slots behind a row's last key are not visited.

    Queries are f32, and tensor cores take 16 bits: q is the sum of a high and a low part in K's type, good to 2^-17 of
    itself for bf16 and 2^-22 for f16, and a score is the sum of two products, accumulated in f32. That doubles the
    arithmetic and not the bytes. Queries for f16 must be within its range.

    Raises NotImplementedError for what is `beyond` it.
    """
    b, window, kv_heads, group, width = queries.shape
    if why := beyond(window, width, k.dtype):
        raise NotImplementedError(f"votes: {why}")
    blocks = blocks_for(window, group, width)
    tiles, spans, slots = -(-group // blocks.heads), -(-k.shape[3] // SPAN), k.shape[3]
    spare, more = blocks.window - window, tiles * blocks.heads - group

    at = jnp.where(valid, pos.max((1, 2))[:, None] - jnp.arange(window)[::-1], -1)
    at = jnp.pad(at, ((0, 0), (0, spare)), constant_values=-1)
    rows = jnp.tile(at, (1, blocks.heads))
    rows = jnp.pad(rows, ((0, 0), (0, blocks.rows - rows.shape[1])), constant_values=-1)
    q = jnp.pad(queries, ((0, 0), (0, spare), (0, 0), (0, more), (0, 0))).transpose(0, 2, 3, 1, 4)
    q = _parts(q.reshape(b * kv_heads * tiles, blocks.heads * blocks.window, width), blocks.rows, k.dtype)
    held = jnp.pad(pos, ((0, 0), (0, 0), (0, spans * SPAN - slots)), constant_values=-1)
    last = jnp.where(held < 0, 0, jnp.arange(1, spans * SPAN + 1)).max((1, 2))
    held = jnp.where(held < 0, FAR, held)
    operands = q, k, jnp.asarray(layer, jnp.int32), held, last, rows

    lse = _sums(*operands, blocks=blocks, spans=spans, interpret=interpret)[..., : blocks.heads * blocks.window]
    lse = lse.reshape(b, kv_heads, tiles, spans, blocks.heads, blocks.window)
    lse = jax.nn.logsumexp(lse / LOG2E, 3)
    if sinks is not None:
        sink = jnp.pad(sinks.astype(jnp.float32).reshape(kv_heads, group), ((0, 0), (0, more)))
        lse = jnp.logaddexp(lse, sink.reshape(kv_heads, tiles, blocks.heads, 1))
    votes = (at >= 0)[:, None, None, None] & (lse > -jnp.inf)
    lse = jnp.where(votes, lse * LOG2E, jnp.inf)  # the weights of what has no vote are 0
    received = _received(*operands, lse.reshape(len(q), -1), blocks=blocks, spans=spans, interpret=interpret)
    received = received.reshape(b, kv_heads, -1, spans * SPAN)[:, :, :group, :slots]
    return jnp.where((jnp.arange(slots) < last[:, None])[:, None, None], received, 0)


def _parts(q: Float[Array, "n m H"], rows: int, dtype: Any) -> Float[Array, "n 2 M H"]:
    """High and low parts of q, whose sum it is, in M = `rows`.

    XLA would drop a cast to 16 bits and back, and with it the low part; `reduce_precision` stays.
    """
    info = jnp.finfo(dtype)
    high = lax.reduce_precision(q, info.nexp, info.nmant)
    both = jnp.stack([high.astype(dtype), (q - high).astype(dtype)], 1)
    return jnp.pad(both, ((0, 0), (0, 0), (0, rows - q.shape[1]), (0, 0)))


class _Tile(NamedTuple):
    """What a warpgroup works on: queries of some heads, and blocks [start, stop) of the keys."""

    index: Any
    span: Any
    warpgroup: Any
    start: Any
    stop: Any
    held: Any  # the positions of the keys
    at: Any  # of the queries
    scores: Callable[..., Array]  # (block, shape, f(q, k) -> operands) -> their product, of both parts of q


def _sums(
    q: Float[Array, "n 2 M H"], *operands: Array, blocks: Blocks, spans: int, interpret: bool
) -> Float[Array, "n spans M"]:
    """Each query's log-sum-exp over a span's keys, to base 2. A warpgroup has 64 queries, and all take every block."""

    def consume(tile: _Tile, out: Any) -> None:
        rows = pl.ds(tile.warpgroup * ROWS, ROWS)
        at = plgpu.load(tile.at.at[rows], layout=BY_ROW, optimized=False)

        def block(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            top, total = carry
            s = tile.scores(i, (ROWS, blocks.keys), lambda q, k: (q.at[rows], k.T))
            held = plgpu.load(tile.held.at[pl.ds(i * blocks.keys, blocks.keys)], layout=BY_COLUMN, optimized=False)
            s = _masked(s, held, 1, at)
            new = jnp.maximum(top, s.max(axis=1) * LOG2E)
            p = jnp.exp2(s * LOG2E - lax.broadcast_in_dim(new, s.shape, [0]))
            return new, total * jnp.exp2(top - new) + p.sum(axis=1)

        start = tuple(plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), BY_ROW) for x in (LOWEST, 0))
        top, total = lax.fori_loop(tile.start, tile.stop, block, start)
        out[tile.index, tile.span, rows] = jnp.where(total > 0, top + jnp.log2(total), -jnp.inf)

    warpgroups = q.shape[2] // ROWS
    return _sweep(
        consume,
        (len(q), spans, q.shape[2]),
        (q, *operands),
        spans=spans,
        keys=blocks.keys,
        wide=blocks.wide,
        stages=2,
        warpgroups=warpgroups,
        readers=warpgroups,
        interpret=interpret,
    )


def _received(
    q: Float[Array, "n 2 M H"], *operands: Array, blocks: Blocks, spans: int, interpret: bool
) -> Float[Array, "n heads S"]:
    """Each key's weights summed over the window. A warpgroup has 64 keys, all queries as columns; they take turns."""
    warpgroups = 2 if blocks.wide == q.shape[3] else 1  # a place for copies is always the same one's

    def consume(tile: _Tile, out: Any, lse_gmem: Any) -> None:
        at = plgpu.load(tile.at.at[pl.ds(0, blocks.window)], layout=BY_COLUMN, optimized=False)

        def block(turn: Array, _: None) -> None:
            i = tile.start + turn * warpgroups + tile.warpgroup
            keys = pl.ds(i * ROWS, ROWS)
            held = plgpu.load(tile.held.at[keys], layout=BY_ROW, optimized=False)
            scores = tile.scores(i, (ROWS, q.shape[2]), lambda q, k: (k, q.T))
            for head in range(blocks.heads):
                first = head * blocks.window
                lse = plgpu.load(
                    lse_gmem.at[tile.index, pl.ds(first, blocks.window)], layout=BY_COLUMN, optimized=False
                )
                s = _masked(scores[:, first : first + blocks.window], held, 0, at)
                p = jnp.exp2(s * LOG2E - lax.broadcast_in_dim(lse, s.shape, [1]))
                out[tile.index, head, keys] = p.sum(axis=1)

        turns = lax.div(tile.stop - tile.start - tile.warpgroup + warpgroups - 1, warpgroups)
        lax.fori_loop(0, turns, block, None)

    return _sweep(
        consume,
        (len(q), blocks.heads, spans * SPAN),
        (q, *operands),
        spans=spans,
        keys=ROWS,
        wide=blocks.wide,
        stages=2 if blocks.wide > 128 else 4,
        warpgroups=warpgroups,
        readers=1,
        interpret=interpret,
    )


def _masked(s: Float[Array, "M N"], held: Int[Array, " keys"], axis: int, at: Int[Array, " m"]) -> Float[Array, "M N"]:
    """Scores of keys along `axis` and queries along the other, -inf where a query does not see the key."""
    key, query = (lax.broadcast_in_dim(x, s.shape, [d]) for x, d in ((held, axis), (at, 1 - axis)))
    return jnp.where(key <= query, s, -jnp.inf)


def _sweep(
    consume: Callable[..., None],
    shape: tuple[int, ...],
    operands: tuple[Array, ...],
    *,
    spans: int,
    keys: int,
    wide: int,
    stages: int,
    warpgroups: int,
    readers: int,
    interpret: bool,
) -> Float[Array, "..."]:
    """Warpgroups `consume` a span's blocks of K, which one more copies; each block goes to so many `readers`."""
    q, k, layer, held, last, at, *more = operands
    n, _, rows, width = q.shape
    _, b, kv_heads, slots, _ = k.shape
    chunks, per = width // wide, SPAN // keys
    registers = REGISTERS.get(warpgroups)

    def count_votes(q_gmem, k_gmem, layer_gmem, held_gmem, last_gmem, at_gmem, *rest):
        *more_gmem, out_gmem, q_smem, k_smem, q_full, k_full, k_free = rest
        index, span, wg = (lax.axis_index(name) for name in ("tile", "span", "wg"))
        head = lax.div(index, n // (b * kv_heads))
        row = lax.div(head, kv_heads)
        start = span * per
        stop = jnp.clip(lax.div(last_gmem[row] + keys - 1, keys), start, start + per)
        copies = (stop - start) * chunks

        def place(i: Array, chunk: int) -> tuple[Array, Array]:
            copy = (i - start) * chunks + chunk
            return copy, lax.rem(copy, stages)

        def produce() -> None:
            if registers:
                plgpu.set_max_registers(registers[1], action="decrease")
            stacked = layer_gmem[0] * (b * kv_heads) + head

            @pl.when(copies > 0)
            def _() -> None:
                for part in range(2):
                    for c in range(chunks):
                        columns = pl.ds(c * wide, wide)
                        plgpu.copy_gmem_to_smem(q_gmem.at[index, part, :, columns], q_smem.at[part, c], q_full)

            def block(i: Array, _: None) -> None:
                for c in range(chunks):
                    copy, slot = place(i, c)
                    pl.when(copy >= stages)(lambda slot=slot: plgpu.barrier_wait(k_free.at[slot]))
                    where = stacked, pl.ds(i * keys, keys), pl.ds(c * wide, wide)
                    plgpu.copy_gmem_to_smem(k_gmem.at[where], k_smem.at[slot], k_full.at[slot])

            def drain(copy: Array, _: None) -> None:
                plgpu.barrier_wait(k_free.at[lax.rem(copy, stages)])

            lax.fori_loop(start, stop, block, None)
            lax.fori_loop(jnp.maximum(copies - stages, 0), copies, drain, None)  # nobody arrives after the end

        def scores(i: Array, shape: tuple[int, int], operands: Callable[..., tuple]) -> Array:
            def product(acc: Any) -> Array:
                for c in range(chunks):
                    _, slot = place(i, c)
                    plgpu.barrier_wait(k_full.at[slot])
                    for part in range(2):
                        plgpu.wgmma(acc, *operands(q_smem.at[part, c], k_smem.at[slot]))
                    plgpu.wgmma_wait(0)  # the next copy overwrites what it reads
                    plgpu.barrier_arrive(k_free.at[slot])
                return acc[...]

            return pl.run_scoped(product, plgpu.ACC(shape))  # pyright: ignore[reportPrivateImportUsage]

        def compute() -> None:
            if registers:
                plgpu.set_max_registers(registers[0], action="increase")
            pl.when(copies > 0)(lambda: plgpu.barrier_wait(q_full))
            own = held_gmem.at[row, lax.rem(head, held.shape[1])]
            consume(_Tile(index, span, wg, start, stop, own, at_gmem.at[row], scores), out_gmem, *more_gmem)

        pl.when(wg == warpgroups)(produce)
        pl.when(wg < warpgroups)(compute)

    def smem(*shape: int) -> Any:
        swizzle = plgpu.find_swizzle(16 * wide)
        tiling = plgpu.TilingTransform((8, swizzle // 2))  # pyright: ignore[reportAbstractUsage]
        return plgpu.SMEM(shape, k.dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))  # pyright: ignore[reportAbstractUsage]

    return plgpu.kernel(
        count_votes,
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(n, spans),
        grid_names=("tile", "span"),
        num_threads=warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[
            smem(2, chunks, rows, wide),
            smem(stages, keys, wide),
            plgpu.Barrier(num_arrivals=2 * chunks),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages, num_arrivals=readers),
        ],
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(q, k.reshape(-1, slots, width), layer.reshape(1), held, last, at, *more)
