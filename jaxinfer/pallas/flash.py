"""Flash attention over a cache, for chunks of a prompt on Hopper (FlashAttention-3, arXiv:2407.08608).

Two warpgroups compute in turns: while one has the tensor cores for the values of a block and the scores of the next,
the other takes its softmax. A third one copies blocks ahead of them, also across tiles of queries.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.cache import KVCache
from jaxinfer.pallas.bounds import Visit, beyond, visit
from jaxinfer.pallas.registers import tiled
from jaxinfer.tree import Index

ROWS = 64  # of a warpgroup's product
COMPUTING = 2  # warpgroups
REGISTERS = 24, 240  # of the copying and the computing warpgroups' threads: together 24 + 2 * 240 <= 3 * 168
LOG2E = math.log2(math.e)
LOWEST = -1e30  # a softmax's maximum before any key: finite, so that no weight is nan
SHARED = 226 * 1024  # bytes of a multiprocessor's shared memory, less what barriers take
WGMMA = plgpu.Layout.WGMMA
ROW, COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
ACC: Any = plgpu.WGMMAAccumulatorRef


@dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    keys: of a block. stages: blocks of K and of V in flight. halves: 2 where a warpgroup's registers hold half a head's
    width alone: then both have the same queries, and each its half of V. ctas: that share all tiles.
    """

    keys: int
    stages: int = 2
    halves: int = 1
    ctas: int = 132  # multiprocessors of an H100 or H200

    @property
    def rows(self) -> int:
        """Of a tile of queries."""
        return ROWS * COMPUTING // self.halves


def blocks_for(width: int, slots: int) -> Blocks:
    """The most keys that shared memory holds twice, for an H200: 128 beat 64 by a seventh where both fit."""
    keys = 128 if width <= 128 else 64 if width <= 256 else 32
    return Blocks(keys=math.gcd(slots, keys), halves=1 if width <= 256 else 2)


# A program of many layers holds few of these functions: each is traced, and its kernel compiled, once.
@partial(jax.jit, static_argnames=("scale", "window", "aligned", "softcap", "blocks", "skip", "interpret"))
def flash_attention(
    q: Float[Array, "B T K G H"],
    cache: KVCache,
    layer: Index,
    pos: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    aligned: bool = False,
    sinks: Float[Array, " N"] | None = None,
    softcap: float | None = None,
    blocks: Blocks | None = None,
    skip: bool = True,
    interpret: bool = False,
) -> Float[Array, "B T K G H"]:
    """`attention_reference` for bf16 and f16: products and softmax in f32, weights rounded to q's type.

    Positions of a row ascend, padding first. The bits of a query depend on what it sees and on `blocks`, and not on the
    other queries, rows and keys, nor on the slots that keys lie in, as long as blocks start at the same positions.
    Without `skip` all blocks are visited, which changes no bit. Raises NotImplementedError for what `beyond` names.
    """
    b, t, kv_heads, group, width = q.shape
    if why := beyond(cache, q.dtype):
        raise NotImplementedError(f"flash_attention: {why}")
    slots = cache.k.shape[3]
    blocks = blocks or blocks_for(width, slots)
    if width % (16 * blocks.halves) or width // blocks.halves > 256 or blocks.keys % 16 or slots % blocks.keys:
        raise ValueError(f"{blocks} do not fit heads of {width} and {slots} slots")
    # A tile's rows are (head, token): with several heads it spans fewer positions, and so fewer blocks at the window's
    # ends. Products read rows 8 at a time.
    heads = math.gcd(group, blocks.rows // 8)
    tokens = blocks.rows // heads
    before = ((0, 0), (-t % tokens, 0))
    x = jnp.pad(q.reshape(b, t, kv_heads * group, width), (*before, (0, 0), (0, 0)))
    at = jnp.pad(pos, before, mode="edge").reshape(b, -1, 1, tokens)
    at = jnp.repeat(at, heads, axis=2).reshape(b, at.shape[1], COMPUTING // blocks.halves, ROWS)
    tops = None
    if sinks is not None:
        tops = jnp.repeat(sinks.astype(jnp.float32) * LOG2E, tokens).reshape(-1, COMPUTING // blocks.halves, ROWS)
    options = {"scale": scale, "window": window, "aligned": aligned, "softcap": softcap, "skip": skip}
    o = _attend(x, cache, layer, at, tops, blocks, heads=heads, interpret=interpret, **options)
    return o[:, -t:].reshape(q.shape)


class _Tile(NamedTuple):
    """A tile of queries of a row and some of its heads, the blocks that it visits, and the positions of its rows."""

    row: Array
    number: Array
    heads: Array
    seen: Visit
    pos: Any


def _attend(
    q: Float[Array, "B T N H"],
    cache: KVCache,
    layer: Index,
    pos: Int[Array, "B J Y M"],
    tops: Float[Array, "X Y M"] | None,
    blocks: Blocks,
    *,
    heads: int,
    scale: float,
    window: int | None,
    aligned: bool,
    softcap: float | None,
    skip: bool,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """Attention of whole tiles: J of `tokens` queries of each of X sets of heads, in Y sets of a warpgroup's M rows."""
    b, t, n, width = q.shape
    tiles, sets = pos.shape[1:3]
    kv_heads, slots = cache.k.shape[2:4]
    keys, stages, halves = blocks.keys, blocks.stages, blocks.halves
    tokens, run, groups = t // tiles, min(t // tiles, ROWS), n // heads
    count, half_width = slots // keys, width // halves
    items = tiles * b * groups
    ctas = min(items, blocks.ctas)
    rounds = -(-items // ctas)
    factor = scale * LOG2E if softcap is None else LOG2E  # weights are powers of 2

    def flash_prefill(q_gmem, k_gmem, v_gmem, held_gmem, pos_gmem, layer_gmem, shift_gmem, tops_gmem, o_gmem, *scratch):
        q_smem, k_smem, v_smem, own_smem, q_full, q_free, k_full, k_free, v_full, v_free, turn, met = scratch
        o_smem = q_smem if own_smem is None else own_smem
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        my_rows, my_half = lax.rem(wg, sets), lax.rem(wg, halves)

        def place(step: Any) -> Any:  # there and back again, so that no CTA has the longest of every round
            return jnp.where(lax.rem(step, 2) == 0, cta, ctas - 1 - cta)

        mine = lax.div(items - 1 - place(jnp.int32(rounds - 1)), ctas) + 1  # the last round may be short

        def tile_of(step: Array, positions: bool = False) -> _Tile:
            item = step * ctas + place(step)
            group, item = lax.rem(item, groups), lax.div(item, groups)
            row, item = lax.rem(item, b), lax.div(item, b)
            number = tiles - 1 - item  # the longest first
            seen = visit(
                pos_gmem[row, number, 0, 0],
                pos_gmem[row, number, sets - 1, ROWS - 1],
                None if shift_gmem is None else shift_gmem[row],
                slots=slots,
                block=keys,
                window=window,
                aligned=aligned,
                skip=skip,
            )
            pos = plgpu.load(pos_gmem.at[row, number, my_rows], layout=ROW, optimized=False) if positions else None
            return _Tile(row, number, group, seen, pos)

        def kv_head(tile: _Tile) -> Array:
            return lax.div(tile.heads * heads, n // kv_heads)

        def slots_of(tile: _Tile, i: Any) -> Any:
            return pl.ds(lax.rem(tile.seen.first + i, count) * keys, keys)

        def columns(half: Any) -> Any:
            return pl.ds(half * half_width, half_width)

        def tokens_of(gmem: Any, tile: _Tile, first: int, half: Any) -> Any:
            """The queries, or outputs, of the run of rows from `first` on: consecutive tokens of a head."""
            head, token = divmod(first, tokens)
            return gmem.at[tile.row, pl.ds(tile.number * tokens + token, run), tile.heads * heads + head, columns(half)]

        def produce() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="decrease")

            def one_tile(step: Array, done: Array) -> Array:
                tile = tile_of(step)
                stack = (layer_gmem[0] * b + tile.row) * kv_heads + kv_head(tile)

                plgpu.barrier_wait(q_free)
                for first in range(0, blocks.rows, run):
                    for half in range(halves):
                        here = q_smem.at[first // ROWS, half, pl.ds(first % ROWS, run)]
                        plgpu.copy_gmem_to_smem(tokens_of(q_gmem, tile, first, half), here, q_full)

                def block(i: Array, _: None) -> None:
                    slot = lax.rem(done + i, stages)
                    for gmem, smem, full, free in ((k_gmem, k_smem, k_full, k_free), (v_gmem, v_smem, v_full, v_free)):
                        plgpu.barrier_wait(free.at[slot])
                        for half in range(halves):
                            here = gmem.at[stack, slots_of(tile, i), columns(half)]
                            plgpu.copy_gmem_to_smem(here, smem.at[slot, half], full.at[slot])

                lax.fori_loop(0, tile.seen.count, block, None)
                return done + tile.seen.count

            lax.fori_loop(0, mine, one_tile, jnp.int32(0))
            # Every buffer becomes free once more than it is filled: nothing may still arrive when the kernel ends.
            plgpu.barrier_wait(q_free)
            for s in range(stages):
                plgpu.barrier_wait(k_free.at[s])
                plgpu.barrier_wait(v_free.at[s])

        def compute() -> None:
            plgpu.set_max_registers(REGISTERS[1], action="increase")
            plgpu.barrier_arrive(q_free)
            for s in range(stages):
                plgpu.barrier_arrive(k_free.at[s])
                plgpu.barrier_arrive(v_free.at[s])
            pl.when(wg == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))

            def look(step: Array) -> _Tile:
                return tile_of(jnp.minimum(step, mine - 1), positions=True)

            def one_tile(step: Array, begun: tuple[Array, _Tile | None]) -> tuple[Array, _Tile | None]:
                done, tile = begun
                tile = look(step) if tile is None else tile
                some, stop = jnp.minimum(tile.seen.count, 1), tile.seen.count
                least = jnp.zeros_like(tile.pos)
                if window is not None:
                    oldest = lax.div(tile.pos, window) * window if aligned else tile.pos - (window - 1)
                    least = jnp.maximum(oldest, 0)
                held = layer_gmem[0] * b + tile.row
                if cache.pos.shape[2] > 1:
                    held = held * kv_heads + kv_head(tile)

                def across(x: Array, like: Array) -> Array:
                    return lax.broadcast_in_dim(x, like.shape, [0])

                def slot(i: Any) -> Array:
                    return lax.rem(done + i, stages)

                def positions(i: Any) -> Array:  # loaded before the products, which take as long
                    return plgpu.load(held_gmem.at[held, slots_of(tile, i)], layout=COLUMN, optimized=False)

                def scores(s: Any, i: Any) -> None:
                    for half in range(halves):
                        plgpu.wgmma(s, q_smem.at[my_rows, half], k_smem.at[slot(i), half].T)
                    plgpu.barrier_arrive(turn.at[1 - wg])

                def eighths(p: Array) -> Array:
                    """Sums of a row over every eighth column: those of one thread. Others join at the end."""
                    parts = [lax.slice(p, (0, i), (ROWS, i + 8)) for i in range(0, keys, 8)]
                    return sum(parts[1:], parts[0])

                def softmax(key: Array | None, s: Array, top: Array, total: Array) -> tuple[Array, Array, Array, Array]:
                    if softcap is not None:  # tanh x = 1 - 2 / (1 + exp 2x): tanh itself is an approximation to 11 bits
                        s = softcap - 2 * softcap / (1 + jnp.exp2(s * (2 * LOG2E * scale / softcap)))
                    if key is not None:
                        key = lax.broadcast_in_dim(key, s.shape, [1])
                        s = jnp.where((key <= across(tile.pos, s)) & (key >= across(least, s)), s, -jnp.inf)
                    new = jnp.maximum(top, s.max(axis=1) * factor)
                    decay, p = jnp.exp2(top - new), jnp.exp2(s * factor - across(new, s))
                    return p.astype(q.dtype), new, total * across(decay, total) + eighths(p), decay

                def first_block(carry: tuple) -> tuple:
                    acc, p, top, total = carry
                    key = positions(0)
                    plgpu.barrier_wait(k_full.at[slot(0)])
                    plgpu.barrier_wait(turn.at[wg])
                    s = pl.run_scoped(lambda s: (scores(s, 0), s[...])[1], ACC((ROWS, keys)))
                    plgpu.barrier_arrive(k_free.at[slot(0)])
                    p, top, total, _ = softmax(key, s, top, total)
                    return acc, p, top, total

                def block(masked: bool, i: Array, carry: tuple) -> tuple:
                    """The values of block i - 1, whose softmax is done, and the scores of block i."""
                    acc, p, top, total = carry
                    values = v_smem.at[slot(i - 1), my_half]
                    key = positions(i) if masked else None
                    plgpu.barrier_wait(k_full.at[slot(i)])
                    plgpu.barrier_wait(v_full.at[slot(i - 1)])

                    def products(refs: tuple) -> None:
                        # The operand in registers goes first: while products run, nothing may write to registers.
                        plgpu.wgmma(refs[0], p, values)
                        scores(refs[1], i)

                    plgpu.barrier_wait(turn.at[wg])
                    if interpret:
                        acc = _dot(acc, p, values, interpret)
                        s = pl.run_scoped(lambda s: (scores(s, i), s[...])[1], ACC((ROWS, keys)))
                    else:
                        zero = plgpu.layout_cast(jnp.zeros((ROWS, keys), jnp.float32), WGMMA)
                        acc, s = pl.run_state(products)((ACC.init(acc), ACC.init(zero)))
                    plgpu.barrier_arrive(k_free.at[slot(i)])
                    plgpu.barrier_arrive(v_free.at[slot(i - 1)])
                    p, top, total, decay = softmax(key, s, top, total)
                    return acc * across(decay, acc), p, top, total

                def last_values(carry: tuple) -> tuple:
                    acc, p, top, total = carry
                    plgpu.barrier_wait(v_full.at[slot(stop - 1)])
                    acc = _dot(acc, p, v_smem.at[slot(stop - 1), my_half], interpret)
                    plgpu.barrier_arrive(v_free.at[slot(stop - 1)])
                    return acc, p, top, total

                top = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), ROW)
                total = plgpu.layout_cast(jnp.zeros((ROWS, 8), jnp.float32), WGMMA)
                if tops_gmem is not None:
                    top = plgpu.load(tops_gmem.at[tile.heads, my_rows], layout=ROW, optimized=False)
                    total += 1 / 8
                acc = plgpu.layout_cast(jnp.zeros((ROWS, half_width), jnp.float32), WGMMA)
                carry = acc, plgpu.layout_cast(jnp.zeros((ROWS, keys), q.dtype), WGMMA), top, total
                plain = jnp.clip(tile.seen.plain, some, stop)
                edge = jnp.clip(tile.seen.edge, plain, stop)
                plgpu.barrier_wait(q_full)
                carry = lax.fori_loop(0, some, lambda _, carry: first_block(carry), carry)
                for masked, lo, hi in ((True, some, plain), (False, plain, edge), (True, edge, stop)):
                    carry = lax.fori_loop(lo, hi, partial(block, masked), carry)
                if own_smem is not None:
                    plgpu.barrier_arrive(q_free)
                following = look(step + 1) if ahead else None  # loads while this tile ends
                acc, _, _, total = lax.fori_loop(0, some, lambda _, carry: last_values(carry), carry)

                if halves > 1:
                    plgpu.barrier_arrive(met)
                    plgpu.barrier_wait(met)  # both have read all queries, where the outputs now go
                inverse = 1 / jnp.maximum(total.sum(axis=1), jnp.finfo(jnp.float32).tiny)
                o_smem[my_rows, my_half] = (acc * across(inverse, acc)).astype(q.dtype)
                plgpu.commit_smem()
                for first in range(0, blocks.rows, run):

                    def store(first: int = first) -> None:
                        here = o_smem.at[my_rows, my_half, pl.ds(first % ROWS, run)]
                        plgpu.copy_smem_to_gmem(here, tokens_of(o_gmem, tile, first, my_half))

                    pl.when((sets == 1) | (wg == first // ROWS))(store)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # before the next tile's outputs, or queries
                if own_smem is None:
                    plgpu.barrier_arrive(q_free)
                return done + stop, following

            ahead = half_width <= 128  # or its registers would be spilled
            lax.fori_loop(0, mine, one_tile, (jnp.int32(0), look(jnp.int32(0)) if ahead else None))
            pl.when(wg == 0)(lambda: plgpu.barrier_wait(turn.at[0]))  # as above, at the end of produce

        pl.when(wg == COMPUTING)(produce)
        pl.when(wg < COMPUTING)(compute)

    def smem(*shape: int) -> Any:
        return plgpu.SMEM(shape, q.dtype, transforms=tiled(math.gcd(half_width, keys)))

    barriers = partial(plgpu.Barrier, num_barriers=stages)
    q_shape, kv_shape = (sets, halves, ROWS, half_width), (stages, halves, keys, half_width)
    room = 4 * width * (blocks.rows + stages * keys) <= SHARED  # for outputs of their own
    return plgpu.kernel(
        flash_prefill,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=COMPUTING + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[
            smem(*q_shape),
            smem(*kv_shape),
            smem(*kv_shape),
            smem(*q_shape) if room else None,
            plgpu.Barrier(num_arrivals=blocks.rows // run * halves),
            plgpu.Barrier(num_arrivals=COMPUTING),
            barriers(num_arrivals=halves),
            barriers(num_arrivals=COMPUTING),
            barriers(num_arrivals=halves),
            barriers(num_arrivals=COMPUTING),
            plgpu.Barrier(num_barriers=COMPUTING),
            plgpu.Barrier(num_arrivals=COMPUTING),
        ],
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(
        q,
        *(a.reshape(-1, *a.shape[3:]) for a in (cache.k, cache.v, cache.pos)),  # in place: views
        pos,
        jnp.asarray(layer, jnp.int32).reshape(1),
        cache.shift,
        tops,
    )


def _dot(acc: Array, a: Array, b: Any, interpret: bool) -> Array:
    """acc + a @ b, with a in registers and b in shared memory."""
    if interpret:  # which knows no product with an operand in registers
        values = b[...]
        plgpu.commit_smem()
        return acc + jnp.dot(a, values, preferred_element_type=acc.dtype)
    return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(ACC.init(acc))
