"""Flash attention over a cache from one source for sm_80, 89 and 90: pipelined copies and products of single warps.

Decoding and verifying split a row's keys (arXiv:2307.08691, section 3.1, over CTAs); chunks are for GPUs before sm_90.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.cache import KVCache
from jaxinfer.pallas.bounds import beyond, combine, part, visit
from jaxinfer.tree import Index

FEW = 8  # tokens of a call up to which a row's keys are split
LOG2E = math.log2(math.e)
LOWEST = float(jnp.finfo(jnp.float32).min)  # a softmax's maximum before any key: finite, so that no weight is nan
WARPS = 4  # of a warpgroup


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
    # The rows of a KV head, (token, head), ascend by position; those that fill the first tile are like the first.
    pad = -(t * group) % blocks.rows
    before = ((0, 0), (pad, 0))
    x = jnp.pad(q.swapaxes(1, 2).reshape(b * kv_heads, t * group, width), (*before, (0, 0)))
    at = jnp.pad(jnp.repeat(pos, group, axis=1), before, mode="edge")
    tops = None
    if sinks is not None:
        tops = jnp.pad(jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, group) * LOG2E, (1, t)), before)
    options = {"scale": scale, "window": window, "aligned": aligned, "softcap": softcap, "skip": skip}
    out = _attend(x, cache, layer, at, tops, blocks, hopper=hopper, interpret=interpret, **options)
    o, *lse = (a.reshape(b, kv_heads, *a.shape[1:]) for a in out)
    o = combine(o[..., pad:, :], lse[0][..., pad:]).astype(q.dtype) if lse else o[..., pad:, :]
    return o.reshape(b, kv_heads, t, group, width).swapaxes(1, 2)


def _attend(
    q: Float[Array, "BK M H"],
    cache: KVCache,
    layer: Index,
    pos: Int[Array, "B M"],
    tops: Float[Array, "K M"] | None,
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
    """Attention of whole tiles of rows: [o [BK, M, H]].

    With P splits theirs in f32, [o [BK, P, M, H], lse [BK, P, M] to base 2]; where lse is -inf, o may be anything.
    """
    heads, m, width = q.shape
    _, b, kv_heads, slots, _ = cache.k.shape
    rows, keys, splits = blocks.rows, blocks.keys, blocks.splits
    tiles, count = m // rows, slots // keys
    workers = min(splits, max(blocks.ctas // (heads * tiles), 1))
    LHS, RHS, ACC = (getattr(plgpu.Layout, f"MMA_{x}")(q.dtype, m_warps=blocks.warps) for x in ("LHS", "RHS", "ACC"))
    ROW, COLUMN = LHS.reduce(1), LHS.reduce(0)  # ROW is also ACC's
    piece = width if width % 64 else 64
    pieces = [pl.ds(i, piece) for i in range(0, width, piece)]

    def across(x: Array, columns: int, layout: Any) -> Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (rows, columns), [0]), layout)

    def zeros(columns: int) -> Array:
        return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), ACC)

    def body(layer_gmem, shift_gmem, pos_gmem, tops_gmem, q_gmem, k_gmem, v_gmem, held_gmem, *rest):
        *outs, s_smem = rest
        head, tile = lax.axis_index("head"), lax.axis_index("tile")
        row, kv_head = lax.div(head, kv_heads), lax.rem(head, kv_heads)
        mine = pl.ds(tile * rows, rows)
        seen = visit(
            pos_gmem[row, tile * rows],
            pos_gmem[row, tile * rows + rows - 1],
            None if shift_gmem is None else shift_gmem[row],
            slots=slots,
            block=keys,
            window=window,
            aligned=aligned,
        )
        stack = layer_gmem[0] * heads + head
        held = stack if cache.pos.shape[2] > 1 else layer_gmem[0] * b + row
        qs = [plgpu.load(q_gmem.at[head, mine, cols], layout=LHS, optimized=False) for cols in pieces]
        query = plgpu.load(pos_gmem.at[row, mine], layout=ROW, optimized=False)
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
            if tops_gmem is not None:
                sink = plgpu.load(tops_gmem.at[kv_head, mine], layout=ROW, optimized=False)
                top, total = jnp.where(split == 0, sink, top), jnp.where(split == 0, total + 1, total)
            spec = plgpu.BlockSpec((keys, width), lambda i: (stack * count + block(i), 0), transforms=_tiled(width))
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
                    outs[0][head, mine, cols] = (a * inverse).astype(q.dtype)
                return
            outs[1][head, split, mine] = jnp.where(total > 0, top + jnp.log2(total), -jnp.inf)

            @pl.when((start < stop) | (split == 0))
            def store() -> None:
                for a, cols in zip(acc, pieces, strict=True):
                    outs[0][head, split, mine, cols] = a * inverse

    out = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    if splits > 1:
        out = [jax.ShapeDtypeStruct((heads, splits, m, *end), jnp.float32) for end in ((width,), ())]
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(heads, tiles, workers),
        grid_names=("head", "tile", "worker"),
        scratch_types=[plgpu.SMEM((rows, keys), jnp.float32, transforms=_tiled(8, bits=32))],
        # Before sm_90 a pipeline's length is data under this lowering alone.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        cache.shift,
        pos,
        tops,
        q,
        *(a.reshape(-1, width) for a in (cache.k, cache.v)),  # in place: a view
        cache.pos.reshape(-1, slots),
    )


def _tiled(width: int, bits: int = 16) -> tuple:
    """How rows of so many numbers lie in shared memory, for accesses without conflicts."""
    swizzle = plgpu.find_swizzle(bits * width)
    tiling, swizzling = plgpu.TilingTransform, plgpu.SwizzleTransform
    return tiling((8, swizzle * 8 // bits)), swizzling(swizzle)  # pyright: ignore[reportAbstractUsage]
