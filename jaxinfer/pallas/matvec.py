"""Products of a few tokens with packed weights, at the speed of memory (Hopper).

A warpgroup multiplies 16 rows of a weight. Its four warps share the rows' units of 256 elements, which TMA copies ahead
of them as the file has them. The tensor cores multiply codes with activations as two limbs of 8 bits, so that all sums
within a group are exact. The 8 columns of a product are both limbs of 4 groups: the codes of a group meet those of the
other three in vain, but a scale is then applied once a unit, by one thread. Every token has products of its own: its
bits do not depend on the others.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxinfer.pallas import registers
from jaxinfer.pallas.limbs import Limbs
from jaxinfer.pallas.registers import (
    COLUMNS,
    COUPLES,
    HEAD_BYTES,
    HEADS,
    LIMBS,
    SUMS,
    WORDS,
    Sums,
    Words,
    bytes_layout,
    tiled,
)
from jaxinfer.pallas.tiles import TILES, UNIT, Tile
from jaxinfer.quants import Packed
from jaxinfer.tree import Index

ROWS, WARPS, GROUPS = 16, 4, 8  # rows of a tile, warps of a warpgroup, groups of a unit or of its half
STAGES = 2  # steps in shared memory: more CTAs on a multiprocessor hide what a longer queue would
TOKENS = 4  # that share the reading of codes; more are other CTAs'
PROCESSORS = 132  # of an H100 or H200
PARTIAL = SUMS.reduce((1, 2))

_load = partial(plgpu.load, optimized=False)


def beyond(w: Any) -> str | None:
    """Why the kernel does not multiply with a weight, None where it does."""
    if not isinstance(w, Packed):
        return f"{w.dtype} is not packed"
    *_, rows, width = w.shape
    if w.format.name not in TILES:
        return f"{w.format.name} is read by no kernel"
    if rows % ROWS or width % UNIT or width < WARPS * UNIT:
        return f"{rows} x {width} are not rows by {ROWS} of units of {UNIT}, {WARPS} at least"
    return None


@partial(jax.jit, static_argnames=("combine", "dtype", "warpgroups", "interpret"))
def product(
    x: Limbs,
    weights: Sequence[Sequence[Packed]],
    layer: Index,
    *,
    combine: Callable[..., Array] | None = None,
    residual: Float[Array, "M F"] | None = None,
    dtype: DTypeLike,
    warpgroups: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "M _"], ...]:
    """y = w[layer] x for the limbs of M tokens and each w [R, F, D], in one launch, summed in f32.

    A set of several weights of equal shapes gives one result, combine(y, ...); a single one otherwise y itself. The
    `residual` is added to the only result.
    """
    m = x.codes.shape[0]
    tokens = min(m, TOKENS)
    pad = -m % tokens
    if pad:
        x, residual = jax.tree.map(lambda a: jnp.pad(a, ((0, pad), *((0, 0),) * (a.ndim - 1))), (x, residual))
    heights = [one[0].shape[1] for one in weights]
    units = weights[0][0].shape[2] // UNIT
    if warpgroups is None:
        warpgroups = 2 if sum(heights) <= 2 * PROCESSORS * ROWS and units >= 2 * WARPS else 1
    given = {
        0: x.scale.reshape(-1, units, 8),
        # [token, unit, half, set of 4 groups, group, ...] for groups of 16, and [..., set, group, part, ...] of 32
        16: [a.reshape(-1, units, 2, 2, 4, *a.shape[2:]) for a in (x.codes, x.sums)],
        32: [a.reshape(-1, units, 2, 4, 2, *a.shape[2:]) for a in (x.codes, x.sums)],
    }
    tiles = [[TILES[w.format.name] for w in one] for one in weights]
    planes = [[_planes(w, units) for w in one] for one in weights]

    def body(layer_gmem, given_gmem, planes_gmem, residual_gmem, *rest):
        *outs_gmem, smem, full, met, sums_smem = rest
        tile, first_token = lax.axis_index("tile"), lax.axis_index("token") * tokens
        wg = lax.axis_index("wg") if warpgroups > 1 else 0

        def one_set(i: int, first: Array) -> None:
            rows = pl.ds(layer_gmem[0] * heights[i] + first, ROWS)
            work = [
                _Rows(t, gmem, given_gmem, here, ready, rows, units, first_token, tokens, wg, warpgroups, interpret)
                for t, gmem, here, ready in zip(tiles[i], planes_gmem[i], smem[i], full[i], strict=True)
            ]
            for one in work:
                one.start()
            for j, one in enumerate(work):
                for t, y in enumerate(one.sums()):
                    sums_smem[j, wg, t] = y.sum(axis=2)
            plgpu.commit_smem()

            def finish() -> None:
                parts = [(g, w) for g in range(warpgroups) for w in range(WARPS)]
                for t in range(tokens):
                    each = [
                        [_load(sums_smem.at[j, g, t, :, w], layout=PARTIAL) for g, w in parts] for j in range(len(work))
                    ]
                    ys = [sum(y[1:], y[0]) for y in each]
                    y = ys[0] if combine is None else combine(*ys)
                    where = first_token + t, pl.ds(first, ROWS)
                    if residual_gmem is not None:
                        y = y + _load(residual_gmem.at[where], layout=PARTIAL).astype(jnp.float32)
                    outs_gmem[i][where] = y.astype(dtype)

            if warpgroups > 1:
                plgpu.barrier_arrive(met)
                pl.when(wg == 0)(lambda: plgpu.barrier_wait(met))
            pl.when(wg == 0)(finish)

        before = 0
        for i, height in enumerate(heights):
            mine = tile - before
            pl.when((mine >= 0) & (mine < height // ROWS))(partial(one_set, i, mine * ROWS))
            before += height // ROWS

    def room(w: Packed, tile: Tile) -> dict[str, Any]:
        return {
            name: plgpu.SMEM((warpgroups, STAGES, ROWS, WARPS * n), w.planes[name].dtype, transforms=tiled(n, bits=8))
            for name, n in tile.codes
        }

    def pairs(i: int) -> Any:
        return zip(weights[i], tiles[i], strict=True)

    outs = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct((m + pad, n), dtype) for n in heights),
        grid=((m + pad) // tokens, sum(heights) // ROWS),
        grid_names=("token", "tile"),
        **({"num_threads": warpgroups, "thread_name": "wg"} if warpgroups > 1 else {}),
        scratch_types=[
            [[room(w, t) for w, t in pairs(i)] for i in range(len(weights))],
            [
                [plgpu.Barrier(num_arrivals=len(t.codes), num_barriers=warpgroups * STAGES) for t in one]
                for one in tiles
            ],
            plgpu.Barrier(num_arrivals=warpgroups),
            plgpu.SMEM((max(map(len, weights)), warpgroups, tokens, ROWS, WARPS), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(jnp.asarray(layer, jnp.int32).reshape(1), given, planes, residual)
    return tuple(o[:m] for o in outs)


def _planes(w: Packed, units: int) -> dict[str, Array]:
    """Views of planes: of codes as rows of bytes, of others as rows of units."""
    coded = dict(TILES[w.format.name].codes)
    rows = math.prod(w.shape[:2])
    return {name: p.reshape(rows, *(() if name in coded else (units,)), -1) for name, p in w.planes.items()}


@dataclass
class _Rows:
    """16 rows of a weight and some tokens: every `warpgroups`-th step of 4 units is this warpgroup's."""

    tile: Tile
    planes: dict[str, Any]
    given: Any
    smem: dict[str, Any]
    full: Any
    rows: Any
    units: int
    first_token: Any
    tokens: int
    wg: Any
    warpgroups: int
    interpret: bool

    @property
    def steps(self) -> Any:
        return lax.div(-(-self.units // WARPS) - 1 - self.wg, self.warpgroups) + 1

    def _step(self, i: Any) -> tuple[Any, Any, Any]:
        """Of the i-th step: its number, its first unit and its place; the last begins with units that are done."""
        step = self.wg + i * self.warpgroups
        return step, jnp.minimum(WARPS * step, self.units - WARPS), lax.rem(i, STAGES)

    def _copy(self, i: Any) -> None:
        _, at, slot = self._step(i)
        for name, size in self.tile.codes:
            here = self.planes[name].at[self.rows, pl.ds(at * size, WARPS * size)]
            plgpu.copy_gmem_to_smem(here, self.smem[name].at[self.wg, slot], self.full.at[self.wg * STAGES + slot])

    def start(self) -> None:
        for i in range(STAGES - 1):
            pl.when(i < self.steps)(partial(self._copy, jnp.int32(i)))

    def sums(self) -> list[Sums]:
        """Each token's sums of every row, warp and column."""
        zero = {d: plgpu.layout_cast(jnp.zeros((ROWS, WARPS, GROUPS), d), SUMS) for d in (jnp.int32, jnp.float32)}
        warp = plgpu.broadcasted_iota(jnp.int32, (ROWS, WARPS, GROUPS), 1, layout=SUMS)
        narrow = self.tile.group == 16

        def one_step(i: Any, ys: list[Array]) -> list[Array]:
            step, at, slot = self._step(i)
            plgpu.barrier_wait(self.full.at[self.wg * STAGES + slot])
            words = {}
            for name, size in self.tile.codes:
                codes = _load(self.smem[name].at[self.wg, slot], layout=bytes_layout(size))
                words[name] = registers.words(codes, interpret=self.interpret)
            plgpu.commit_smem()  # all have read what the next copy overwrites
            pl.when(i + STAGES - 1 < self.steps)(lambda: self._copy(i + STAGES - 1))
            units = pl.ds(at, WARPS)
            unit = _Unit(self.planes, self.rows, units, words, self.interpret)
            codes = [self.tile.values(unit, i) for i in range(16)]
            terms = [zero[jnp.float32]] * self.tokens
            for half in range(2 if narrow else 1):
                scale, offset = self.tile.affine(unit, half)
                for t in range(self.tokens):
                    x = _Activations(self.given, self.first_token + t, units, half, self.tile.group, self.interpret)
                    z = zero[jnp.int32]
                    for g in range(GROUPS):
                        a = codes[8 * half + g :][:1] if narrow else codes[2 * g :][:2]
                        limbs = registers.mma(zero[jnp.int32], tuple(a), x.limbs(g // 4), interpret=self.interpret)
                        z = registers.put(z, limbs, g, interpret=self.interpret)
                    terms[t] = terms[t] + scale * x.scale() * z.astype(jnp.float32)
                    if offset is not None:
                        terms[t] = terms[t] + offset * x.sums()
            if self.units % WARPS:
                terms = [jnp.where(at + warp < WARPS * step, 0.0, term) for term in terms]
            return [y + term for y, term in zip(ys, terms, strict=True)]

        return lax.fori_loop(0, self.steps, one_step, [zero[jnp.float32]] * self.tokens)


class _Activations:
    """Limbs of a token for 8 groups of 4 units: of 32 elements, or of 16 of one half of a unit."""

    def __init__(self, given: Any, token: Any, units: Any, half: int, group: int, interpret: bool):
        self.wide, self.half, self.interpret = group == 32, half, interpret
        self.codes, self.parts = (a.at[token, units] for a in given[group])
        self.scales = given[0].at[token, units]
        self.loaded: dict[int, tuple[Array, ...]] = {}

    def limbs(self, s: int) -> tuple[Array, ...]:
        """Of groups 4 s to 4 s + 3, of each 16 elements."""
        if s not in self.loaded:
            where = [(slice(None), s, slice(None), u) for u in (0, 1)] if self.wide else [(slice(None), self.half, s)]
            self.loaded[s] = tuple(_load(self.codes.at[w], layout=LIMBS) for w in where)
        return self.loaded[s]

    def scale(self) -> Sums:
        first, count = (0, 4) if self.wide else (4 * self.half, 2)
        of = COLUMNS if self.wide else COUPLES
        a, b = (_load(self.scales.at[:, pl.ds(first + count * s, count)], layout=of) for s in (0, 1))
        return registers.spread(a, b, of, interpret=self.interpret)

    def sums(self) -> Sums:
        def part(*where: Any) -> Array:
            return _load(self.parts.at[(slice(None), *where)], layout=COLUMNS)

        def group(s: int) -> Array:
            return part(s, slice(None), 0) + part(s, slice(None), 1) if self.wide else part(self.half, s)

        return registers.spread(group(0), group(1), COLUMNS, interpret=self.interpret)


class _Unit:
    """See tiles.Unit."""

    def __init__(self, gmem: Any, rows: Any, units: Any, words: dict[str, tuple[Words, ...]], interpret: bool):
        self.gmem, self.rows, self.units, self.held, self.interpret = gmem, rows, units, words, interpret
        self.t = plgpu.broadcasted_iota(jnp.int32, (ROWS, WARPS, 4), 2, layout=WORDS)
        self.column = plgpu.broadcasted_iota(jnp.int32, (ROWS, WARPS, GROUPS), 2, layout=SUMS) >> 1
        self.heads: dict[tuple[str, int], Array] = {}

    def _at(self, plane: str, *where: Any) -> Any:
        return self.gmem[plane].at[(self.rows, self.units, *where)]

    def _spread(self, a: Array, b: Array, of: Any) -> Sums:
        return registers.spread(a, b, of, interpret=self.interpret)

    def __call__(self, plane: str, i: int) -> Words:
        return self.held[plane][i]

    def head(self, plane: str, i: int) -> Words:
        if (plane, i) not in self.heads:
            word = lax.broadcast_in_dim(self.word(plane, i), (ROWS, WARPS, 4), [0, 1])
            self.heads[plane, i] = plgpu.layout_cast(word, WORDS)
        return self.heads[plane, i]

    def lookup(self, x: Words, table: tuple[int, ...]) -> Words:
        return registers.lookup(x, table, interpret=self.interpret)

    def word(self, plane: str, i: int) -> Array:
        return registers.head_word(_load(self._at(plane, pl.ds(4 * i, 4)), layout=HEAD_BYTES), interpret=self.interpret)

    def byte(self, plane: str, i: int) -> Array:
        return _load(self._at(plane, i), layout=HEADS).astype(jnp.int32)

    def number(self, plane: str) -> Sums:
        d = _load(self._at(plane, 0), layout=HEADS).astype(jnp.float32)
        return self._spread(d, d, HEADS)

    def each(self, plane: str, dtype: DTypeLike) -> Sums:
        a, b = (_load(self._at(plane, pl.ds(4 * s, 4)), layout=WORDS).astype(dtype) for s in (0, 1))
        return self._spread(a, b, WORDS)

    def bytes(self, first: Array, second: Array) -> Sums:
        return (self._spread(first, second, HEADS) >> (8 * self.column)) & 0xFF

    def fields(self, word: Array, width: int) -> Sums:
        return self._spread(word, word >> (4 * width), HEADS) >> (width * self.column)
