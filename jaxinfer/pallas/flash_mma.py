"""Flash attention over a cache from one source for sm_80, 89 and 90: pipelined copies and products of single warps.

Decoding and verifying split a row's keys (arXiv:2307.08691, section 3.1, over CTAs); chunks are for GPUs before sm_90.
"""

import math
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxinfer.cache import KVCache
from jaxinfer.pallas.bounds import beyond, part, visit
from jaxinfer.pallas.registers import gather, layout, store, tiled
from jaxinfer.tree import Index

FEW = 8  # tokens of a call up to which a row's keys are split
LOG2E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)  # a softmax's maximum before any key: finite, so that no weight is nan
WARPS, LANES = 4, 32  # of a warpgroup, of a warp


@dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    rows: of a tile of queries; `warps` of a warpgroup's four divide them, 16 at a time, and the others divide the keys
    of a block, then the width of a head. keys: of a block. stages: blocks of K and V in flight. splits: the most parts
    of a row's blocks, of at least `least` each. ctas: the most to share the parts, or one a tile where that is more.
    """

    rows: int
    warps: int
    keys: int
    stages: int
    splits: int = 1
    least: int = 2
    ctas: int = 1024


def blocks_for(width: int, rows: int, slots: int, kv_heads: int, *, split: bool, hopper: bool) -> Blocks:
    """Blocks for so many rows (tokens times heads of a group) of every KV head.

    Decoding is bound by memory, which wants 64 KB in flight a multiprocessor: Hopper's 227 KB hold two CTAs with 96 KB
    each, Ada's 100 KB two with 48 KB, and wide heads take more, in one. Few rows leave the warps to the keys, so that
    one of them reads each. Tall tiles read keys less often; registers bound them. The splits fill 256 places of CTAs
    for one row of a batch, and may not depend on the others, so that no bit does.
    """
    tall = rows > 32 and width <= 128
    keys = math.gcd(slots, 64 if hopper and width <= (64 if tall else 128) else 32)
    narrow = (rows <= 16 or width > 256) and width % 32 == keys % 32 == 0
    stage, room, most = 4 * keys * width, *((96, 192) if hopper else (48, 64))
    return Blocks(
        rows=64 if tall else 16 if narrow else 32,
        warps=1 if narrow else 2,
        keys=keys,
        stages=max(room * 1024 // stage, min(3, most * 1024 // stage)),
        splits=max(min(256 // kv_heads, 128, slots // keys // 2), 1) if split else 1,
    )


@partial(jax.jit, static_argnames=("scale", "window", "aligned", "softcap", "blocks", "skip", "hopper", "interpret"))
def attention_mma(
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
    hopper: bool,
    interpret: bool = False,
) -> Float[Array, "B T K G H"]:
    """`attention_reference` for bf16 and f16: products and softmax in f32, weights rounded to q's type.

    Positions of a row ascend, padding first. `hopper` says whether the GPU is of sm_90 or of sm_80 and 89. Up to FEW
    tokens share a tile and their keys are split; more are tiled. The bits of a row depend on what it sees and on the
    blocks, not on the batch, nor on the slots that keys lie in, as long as blocks start at the same positions.
    Raises NotImplementedError for what `beyond` names.
    """
    b, t, kv_heads, group, width = q.shape
    slots = cache.k.shape[3]
    if why := beyond(cache, q.dtype):
        raise NotImplementedError(f"attention_mma: {why}")
    blocks = blocks or blocks_for(width, t * group, slots, kv_heads, split=t <= FEW, hopper=hopper)
    others = WARPS // blocks.warps * 8
    if blocks.rows % (16 * blocks.warps) or blocks.keys % others or width % others or slots % blocks.keys:
        raise ValueError(f"{blocks} do not divide {slots=} and {width=}, or their warps do not divide them")
    options = {"scale": scale, "window": window, "aligned": aligned, "softcap": softcap, "skip": skip}
    o, *lse = _attend(q, cache, layer, pos, sinks, blocks, hopper=hopper, interpret=interpret, **options)
    if lse:
        return join(o, lse[0], q.shape, q.dtype, interpret=interpret)
    return o[:, -t * group :].reshape(b, kv_heads, t, group, width).swapaxes(1, 2)


def _attend(
    q: Float[Array, "B T K G H"],
    cache: KVCache,
    layer: Index,
    pos: Int[Array, "B T"],
    sinks: Float[Array, " N"] | None,
    blocks: Blocks,
    *,
    scale: float,
    window: int | None,
    aligned: bool,
    softcap: float | None,
    skip: bool,
    hopper: bool,
    interpret: bool,
) -> list[Array]:
    """Attention of whole tiles of a KV head's rows, (token, head): [o [BK, M, H]], whose last T G rows those are.

    With P splits theirs in f32, [o [BK, P, M, H], lse [BK, P, M] to base 2]; where lse is -inf, o may be anything.
    """
    b, t, kv_heads, group, width = q.shape
    heads, slots = b * kv_heads, cache.k.shape[3]
    rows, keys, splits = blocks.rows, blocks.keys, blocks.splits
    tiles, count = -(-t * group // rows), slots // keys
    m = tiles * rows
    pad = m - t * group  # rows that fill the first tile, where they are like the first: positions ascend
    workers = min(splits, max(blocks.ctas // (heads * tiles), 1))
    LHS, RHS, ACC = (getattr(plgpu.Layout, f"MMA_{x}")(q.dtype, m_warps=blocks.warps) for x in ("LHS", "RHS", "ACC"))
    ROW, COLUMN = LHS.reduce(1), LHS.reduce(0)  # ROW is also ACC's
    piece = width if width % 64 else 64
    pieces = [pl.ds(i, piece) for i in range(0, width, piece)]

    def across(x: Array, columns: int, layout: Any) -> Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (rows, columns), [0]), layout)

    def zeros(columns: int) -> Array:
        return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), ACC)

    def flash_decode(layer_gmem, shift_gmem, pos_gmem, sinks_gmem, q_gmem, k_gmem, v_gmem, held_gmem, *rest):
        *outs, s_smem = rest
        head, tile = lax.axis_index("head"), lax.axis_index("tile")
        row, kv_head = lax.div(head, kv_heads), lax.rem(head, kv_heads)
        mine = pl.ds(tile * rows, rows)
        first = tile * rows - pad
        seen = visit(
            pos_gmem[row, lax.div(jnp.maximum(first, 0), group)],
            pos_gmem[row, lax.div(first + rows - 1, group)],
            None if shift_gmem is None else shift_gmem[row],
            slots=slots,
            block=keys,
            window=window,
            aligned=aligned,
        )
        stack = layer_gmem[0] * heads + head
        held = stack if cache.pos.shape[2] > 1 else layer_gmem[0] * b + row
        index = jnp.maximum(first + plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=ROW), 0)
        token, mate = lax.div(index, group), lax.rem(index, group)
        column = plgpu.broadcasted_iota(jnp.int32, (rows, piece), 1, layout=LHS)
        place = across(((token * kv_heads + kv_head) * group + mate) * width, piece, LHS) + column
        qs = [gather(q_gmem.at[row], place + i, LHS, interpret=interpret) for i in range(0, width, piece)]
        query = gather(pos_gmem.at[row], token, ROW, interpret=interpret)
        least: Any = 0
        if window is not None:
            least = jnp.maximum(lax.div(query, window) * window if aligned else query - (window - 1), 0)
            least = across(least, keys, LHS)

        def masked(block: Array, s: Array) -> Array:
            key = plgpu.load(held_gmem.at[held, pl.ds(block * keys, keys)], layout=COLUMN, optimized=False)
            key = plgpu.layout_cast(lax.broadcast_in_dim(key, s.shape, [1]), LHS)
            return jnp.where((key <= across(query, keys, LHS)) & (key >= least), s, -jnp.inf)

        @plgpu.nd_loop((splits,), collective_axes="worker")
        def one_split(loop: plgpu.NDLoopInfo) -> None:
            (split,) = loop.index
            start, stop = part(seen.count, split, splits, blocks.least)
            plain, edge = seen.plain, seen.edge
            if not skip:  # the last part goes on through the blocks that nothing is seen in
                plain = edge = 0
                stop = jnp.where((start < stop) & (stop == seen.count), count, stop)

            def block(i: Array) -> Array:
                return lax.rem(seen.first + start + i, count)

            def step(index, k_smem, v_smem, carry):
                acc, top, total = carry
                s = zeros(keys)
                for x, cols in zip(qs, pieces, strict=True):
                    s = plgpu.mma(s, x, plgpu.load(k_smem.at[:, cols].T, layout=RHS))
                # A warp has some keys of its rows. The next product wants all of them, and the softmax then needs no
                # other warp. Stores to shared memory stand between barriers.
                s_smem[...] = s
                s = plgpu.load(s_smem, layout=LHS)
                if softcap is None:
                    s *= scale * LOG2E
                else:  # tanh x = 1 - 2 / (1 + exp 2x), for tanh itself is an approximation to 11 bits
                    s = softcap * LOG2E - 2 * softcap * LOG2E / (1 + jnp.exp2(s * (2 * LOG2E * scale / softcap)))
                i = start + index[0]
                s = lax.cond((plain <= i) & (i < edge), lambda s: s, lambda s: masked(block(index[0]), s), s)
                new = jnp.maximum(top, s.max(axis=1))
                decay = jnp.exp2(top - new)
                p = jnp.exp2(s - across(new, keys, LHS))
                total = total * decay + p.sum(axis=1)
                p, decay = p.astype(q.dtype), across(decay, piece, ACC)
                acc = [
                    plgpu.mma(a * decay, p, plgpu.load(v_smem.at[:, cols], layout=RHS))
                    for a, cols in zip(acc, pieces, strict=True)
                ]
                if hopper:
                    plgpu.commit_smem()  # or the next copy may overtake these reads; before sm_90 its barrier is enough
                return acc, new, total

            top, total = (plgpu.layout_cast(jnp.full((rows,), x, jnp.float32), ROW) for x in (LOWEST, 0))
            if sinks_gmem is not None:
                sink = gather(sinks_gmem, kv_head * group + mate, ROW, interpret=interpret) * LOG2E
                top, total = jnp.where(split == 0, sink, top), jnp.where(split == 0, total + 1, total)
            spec = plgpu.BlockSpec((keys, width), lambda i: (stack * count + block(i), 0), transforms=tiled(width))
            pipeline = plgpu.emit_pipeline(
                step,
                grid=(stop - start,),
                in_specs=[spec, spec],
                max_concurrent_steps=blocks.stages,
                init_carry=([zeros(piece) for _ in pieces], top, total),
            )
            acc, top, total = pipeline(k_gmem, v_gmem)
            inverse = across(1 / jnp.maximum(total, jnp.finfo(jnp.float32).tiny), piece, ACC)
            if splits == 1:
                for a, cols in zip(acc, pieces, strict=True):
                    store(outs[0].at[head, mine, cols], (a * inverse).astype(q.dtype))
                return
            store(outs[1].at[head, split, mine], jnp.where(total > 0, top + jnp.log2(total), -jnp.inf))

            @pl.when((start < stop) | (split == 0))
            def store_part() -> None:
                for a, cols in zip(acc, pieces, strict=True):
                    store(outs[0].at[head, split, mine, cols], a * inverse)

    out = [jax.ShapeDtypeStruct((heads, m, width), q.dtype)]
    if splits > 1:
        out = [jax.ShapeDtypeStruct((heads, splits, m, *end), jnp.float32) for end in ((width,), ())]
    return plgpu.kernel(
        flash_decode,
        out_type=out,
        grid=(heads, tiles, workers),
        grid_names=("head", "tile", "worker"),
        scratch_types=[plgpu.SMEM((rows, keys), jnp.float32, transforms=tiled(8, bits=32))],
        # Before sm_90 a pipeline's length is data under this lowering alone.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        cache.shift,
        pos,
        None if sinks is None else sinks.astype(jnp.float32),
        q.reshape(b, -1),
        *(a.reshape(-1, width) for a in (cache.k, cache.v)),  # in place: a view
        cache.pos.reshape(-1, slots),
    )


def join(
    o: Float[Array, "BK P M H"],
    lse: Float[Array, "BK P M"],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    *,
    interpret: bool = False,
) -> Float[Array, "B T K G H"]:
    """Joins P parts of one softmax: outputs and the logarithms, to base 2, of their sums (-inf: the part saw nothing).

    The outputs are those of each part alone (arXiv:2307.08691, section 3.1); one that saw nothing may hold anything.
    `shape` is that of the result, whose rows, (token, head), are the last T G of M. Sums in f32, part by part.
    """
    _, t, kv_heads, group, width = shape
    heads, parts, m, _ = o.shape
    threads = math.gcd(width, WARPS * LANES)  # one has a column; the parts are loaded at once
    columns = _columns(threads)

    def flash_join(o_gmem, lse_gmem, out_gmem):
        head, index, piece = (lax.axis_index(name) for name in ("head", "index", "piece"))
        mine, cols = m - t * group + index, pl.ds(piece * threads, threads)
        sums = [lse_gmem[head, p, mine] for p in range(parts)]
        xs = [plgpu.load(o_gmem.at[head, p, mine, cols], layout=columns, optimized=False) for p in range(parts)]
        top = reduce(jnp.maximum, sums, jnp.float32(LOWEST))
        total, out = jnp.float32(0), plgpu.layout_cast(jnp.zeros((threads,), jnp.float32), columns)
        for x, one in zip(xs, sums, strict=True):
            weight = jnp.exp2(one - top)
            total += weight
            out += jnp.where(weight > 0, x * weight, 0)
        out /= jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        place = lax.div(head, kv_heads), lax.div(index, group), lax.rem(head, kv_heads), lax.rem(index, group)
        store(out_gmem.at[*place, cols], out.astype(dtype))

    return plgpu.kernel(
        flash_join,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(heads, t * group, width // threads),
        grid_names=("head", "index", "piece"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(o, lse)


def _columns(n: int) -> Any:
    """A column for each thread; where there are fewer, several have the same."""
    lanes = min(n, LANES)
    used, spare = n // lanes, LANES // lanes
    warps = [-3] * (used > 1) + [plgpu.Replicated(WARPS // used)] * (used < WARPS)
    return layout([(n,), (lanes,), (1,)], warps, [-2] + [plgpu.Replicated(spare)] * (spare > 1))
