"""Products of a few tokens with packed weights, at the speed of memory (Hopper).

A warpgroup multiplies 16 rows of a weight, whose units of 256 elements its four warps share; or 64 rows, of which each
warp has 16, where rows are short or end within a unit. TMA copies codes ahead of it as the file has them. The tensor
cores multiply them with activations as two limbs of 8 bits, so that all sums within a group are exact. The 8 columns of
a product are both limbs of 4 groups: the codes of a group meet those of the other three in vain, but a scale is then
applied once a unit, by one thread. Every token has products of its own: its bits do not depend on the others.
"""

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
from jaxtyping import Array, Float, Int

from jaxinfer.pallas import registers
from jaxinfer.pallas.limbs import RUN, WHOLE, Limbs
from jaxinfer.pallas.registers import COLUMNS, COUPLES, HEADS, LIMBS, SUMS, Sums
from jaxinfer.pallas.tiles import TILES, UNIT
from jaxinfer.pallas.units import TALL, WIDE, Loaded, Step, copy, load, room, views
from jaxinfer.quants import Format, Packed
from jaxinfer.tree import Index

WARPS, GROUPS, RUNS = 4, 8, UNIT // RUN  # warps of a warpgroup, groups of a unit or of its half, runs of a unit
# Steps in shared memory, at most: more CTAs on a multiprocessor hide what more would, but for short rows there are few.
STAGES = {WIDE: 2, TALL: 4}
TOKENS = 4  # that share the reading of codes; more are other CTAs'
PROCESSORS = 132  # of an H100 or H200
PARTIAL = SUMS.reduce((1, 2))


def beyond(w: Any, parts: int = 1) -> str | None:
    """Why the kernel does not multiply with a weight, or with equal parts of its rows; None where it does."""
    if not isinstance(w, Packed):
        return f"{w.dtype} is not packed"
    *_, rows, width = w.shape
    if w.format.name not in TILES:
        return f"{w.format.name} is read by no kernel"
    step = _step(width)
    if rows % (parts * step.rows) or width % WHOLE or width < UNIT:
        least = f"units of {UNIT}, {WARPS} at least" if step == WIDE else f"{UNIT} elements at least, by {WHOLE}"
        return f"{rows} x {width} are not rows by {parts * step.rows} of {least}"
    return None


def _step(width: int) -> Step:
    return WIDE if width % UNIT == 0 and width >= WARPS * UNIT else TALL


@partial(jax.jit, static_argnames=("combine", "dtype", "warpgroups", "interpret"))
def product(
    x: Limbs,
    weights: Sequence[Sequence[Packed]],
    layer: Index,
    *,
    experts: Int[Array, " C"] | None = None,
    biases: Sequence[Sequence[Float[Array, "..."]]] | None = None,
    combine: Callable[..., Array] | None = None,
    residual: Float[Array, "C F"] | None = None,
    dtype: DTypeLike,
    warpgroups: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "C _"], ...]:
    """y = w[layer] x for the limbs of M = C tokens and each w [R, F, D], in one launch, summed in f32.

    A set of several weights of equal shapes gives one result, combine(y, ...). A single one gives y or, where there is
    something to combine, combine(first half of y, second half). `biases` [R, F], one for each weight, are added to its
    products before. The `residual` is added to the only result.

    With `experts`, weights are [R, E, F, D] and biases [R, E, F], and each of a token's A = C / M choices is a row:
    y[c] = w[layer, experts[c]] x[c // A]. Where there is no such expert nothing is read, and combined results are 0.

    Raises NotImplementedError for weights that are `beyond` the kernel, ValueError for shapes that do not fit.
    """
    m, axes = len(x.codes), 3 if experts is None else 4
    c = m if experts is None else len(experts)
    if c % m:
        raise ValueError(f"{c} choices are no multiple of {m} tokens")
    parts = [2 if combine is not None and len(one) == 1 else 1 for one in weights]
    for one, n in zip(weights, parts, strict=True):
        for w in one:
            if why := beyond(w, n):
                raise NotImplementedError(f"product: {why}")
            if w.ndim != axes:
                raise ValueError(f"a stack of shape {w.shape} has not {axes} axes")
    heights = [one[0].shape[-2] // n for one, n in zip(weights, parts, strict=True)]
    width = weights[0][0].shape[-1]
    step = _step(width)
    steps = -(-width // (step.units * UNIT))
    if warpgroups is None:
        few = experts is None and sum(heights) <= 2 * PROCESSORS * step.rows
        warpgroups = 2 if few and step == WIDE and width >= 2 * WARPS * UNIT else 1
    depth = min(STAGES[step], steps)
    tokens = min(m, TOKENS) if experts is None else 1  # of a CTA
    pad = -c % tokens
    if pad:
        x, residual = jax.tree.map(lambda a: jnp.pad(a, ((0, pad), *((0, 0),) * (a.ndim - 1))), (x, residual))
    of_tile, row_layout = ((WARPS, 16), HEADS) if step == TALL else ((16,), PARTIAL)
    given, planes = _views(x, step, width), [[views(w, step) for w in one] for one in weights]
    biases = [[b.reshape(-1, *of_tile) for b in one] for one in biases or ()]
    if residual is not None:
        residual = residual.reshape(c + pad, -1, *of_tile)

    def rows(ref: Any, *index: Any) -> Any:
        """Those of a tile, as in `row_layout`."""
        return ref.at[index].transpose((1, 0)) if step == TALL else ref.at[index]

    def few_products(layer_gmem, experts_gmem, given_gmem, planes_gmem, biases_gmem, residual_gmem, *rest):
        *outs_gmem, smem, full, met, sums_smem = rest
        tile, first = lax.axis_index("tile"), lax.axis_index("row") * tokens
        wg = lax.axis_index("wg") if warpgroups > 1 else 0
        stack, own, chosen = layer_gmem[0], lax.div(steps - 1 - wg, warpgroups) + 1, True
        if experts is not None:
            expert, count = experts_gmem[first], weights[0][0].shape[1]
            chosen = (expert >= 0) & (expert < count)
            stack, own = stack * count + jnp.where(chosen, expert, 0), jnp.where(chosen, own, 0)
        token = lax.div(first, jnp.int32(c // m))
        share = _Share(step, width, given_gmem, token, tokens, own, wg, warpgroups, depth, interpret)

        def one_set(i: int, mine: Array) -> None:
            n, tiles = parts[i], heights[i] // step.rows
            each = [(j, (stack * n + part) * tiles + mine) for j in range(len(weights[i])) for part in range(n)]
            work = [
                _Rows(share, weights[i][j].format, planes_gmem[i][j], here, ready, at)
                for (j, at), here, ready in zip(each, smem[i], full[i], strict=True)
            ]
            for one in work:
                one.start()
            for k, one in enumerate(work):
                for t, y in enumerate(one.sums()):
                    sums_smem[k, wg, t] = y.sum(axis=2)
            plgpu.commit_smem()

            def total(k: int, t: int) -> Array:
                warps = [()] if step == TALL else [(slice(None), w) for w in range(WARPS)]
                found = [load(sums_smem.at[(k, g, t, *w)], layout=row_layout) for g in range(warpgroups) for w in warps]
                y, (j, at) = sum(found[1:], found[0]), each[k]
                return y + load(rows(biases_gmem[i][j], at), layout=row_layout).astype(jnp.float32) if biases else y

            def finish() -> None:
                for t in range(tokens):
                    where, ys = (first + t, mine), [total(k, t) for k in range(len(work))]
                    y = ys[0] if combine is None else combine(*ys)
                    if experts is not None:
                        y = jnp.where(chosen, y, 0.0)
                    if residual is not None:
                        y = y + load(rows(residual_gmem, *where), layout=row_layout).astype(jnp.float32)
                    rows(outs_gmem[i], *where)[...] = y.astype(dtype)

            if warpgroups > 1:
                plgpu.barrier_arrive(met)
                pl.when(wg == 0)(lambda: plgpu.barrier_wait(met))
            pl.when(wg == 0)(finish)

        before = 0
        for i, height in enumerate(heights):
            mine = tile - before
            pl.when((mine >= 0) & (mine < height // step.rows))(partial(one_set, i, mine))
            before += height // step.rows

    def barriers(w: Packed) -> Any:
        return plgpu.Barrier(num_arrivals=len(TILES[w.format.name].codes), num_barriers=warpgroups * depth)

    entries = [[w for w in one for _ in range(n)] for one, n in zip(weights, parts, strict=True)]
    outs = plgpu.kernel(
        few_products,
        out_type=tuple(jax.ShapeDtypeStruct((c + pad, n // step.rows, *of_tile), dtype) for n in heights),
        grid=((c + pad) // tokens, sum(heights) // step.rows),
        grid_names=("row", "tile"),
        **({"num_threads": warpgroups, "thread_name": "wg"} if warpgroups > 1 else {}),
        scratch_types=[
            [[room(w, step, warpgroups * depth) for w in one] for one in entries],
            [[barriers(w) for w in one] for one in entries],
            plgpu.Barrier(num_arrivals=warpgroups),
            plgpu.SMEM((max(map(len, entries)), warpgroups, tokens, 16, WARPS), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(jnp.asarray(layer, jnp.int32).reshape(1), experts, given, planes, biases, residual)
    return tuple(o.reshape(c + pad, -1)[:c] for o in outs)


def _views(x: Limbs, step: Step, width: int) -> dict[int, Any]:
    """Scales, and codes and sums by groups of 16 and of 32: of a token, or of each of its units that warps share."""
    lead = (len(x.codes),) if step == TALL else (len(x.codes), width // UNIT)
    return {
        0: x.scale.reshape(*lead, -1),
        16: [a.reshape(*lead, -1, *a.shape[2:]) for a in (x.codes, x.sums)],
        32: [a.reshape(*lead, -1, 2, *a.shape[2:]) for a in (x.codes, x.sums)],
    }


@dataclass(frozen=True)
class _Share:
    """What all products of a warpgroup share: its tokens, and its steps, every `warpgroups`-th one."""

    step: Step
    width: int
    given: Any
    first_token: Any
    tokens: int
    steps: Any
    wg: Any
    warpgroups: int
    depth: int
    interpret: bool


@dataclass(frozen=True)
class _Rows:
    """A tile of rows of a weight, times the tokens."""

    share: _Share
    form: Format
    planes: dict[str, Any]
    smem: dict[str, Any]
    full: Any
    tile: Any

    def _place(self, i: Any) -> tuple[Any, Any, Any]:
        """The run that the i-th step is for, the one that it begins with lest it passes the end, and its slot."""
        s = self.share
        runs = RUNS * s.step.units
        begin = (s.wg + i * s.warpgroups) * runs
        return begin, jnp.minimum(begin, s.width // RUN - runs), s.wg * s.depth + lax.rem(i, s.depth)

    def _slot(self, slot: Any) -> dict[str, Any]:
        return {name: ref.at[slot] for name, ref in self.smem.items()}

    def _copy(self, i: Any) -> None:
        _, run, slot = self._place(i)
        copy(self.planes, self._slot(slot), self.full.at[slot], self.form, self.share.step, self.tile, run)

    def start(self) -> None:
        for i in range(self.share.depth):
            pl.when(i < self.share.steps)(partial(self._copy, jnp.int32(i)))

    def sums(self) -> list[Sums]:
        """Each token's sums of every row, warp and column."""
        s, tile, interpret = self.share, TILES[self.form.name], self.share.interpret
        shape, narrow = (16, WARPS, GROUPS), tile.group == 16
        zero = {d: plgpu.layout_cast(jnp.zeros(shape, d), SUMS) for d in (jnp.int32, jnp.float32)}

        def one_step(i: Any, ys: list[Array]) -> list[Array]:
            begin, run, slot = self._place(i)
            unit = Loaded(self.planes, self.form, s.step, self.tile, run, interpret=interpret)
            affine = [tile.affine(unit, half) for half in range(2 if narrow else 1)]  # loaded while codes arrive
            plgpu.barrier_wait(self.full.at[slot])
            unit.take(self._slot(slot))
            plgpu.commit_smem()  # all have read what the next copy overwrites
            pl.when(i + s.depth < s.steps)(lambda: self._copy(i + s.depth))
            codes = [tile.values(unit, i) for i in range(16)]
            terms = [zero[jnp.float32]] * s.tokens
            for half, (scale, offset) in enumerate(affine):
                for t in range(s.tokens):
                    x = _Activations(s.given, s.first_token + t, s.step, run, half, tile.group, interpret)
                    z = zero[jnp.int32]
                    for g in range(GROUPS):
                        a = codes[8 * half + g :][:1] if narrow else codes[2 * g :][:2]
                        limbs = registers.mma(zero[jnp.int32], tuple(a), x.limbs(g // 4), interpret=interpret)
                        z = registers.put(z, limbs, g, interpret=interpret)
                    terms[t] = terms[t] + scale * x.scale() * z.astype(jnp.float32)
                    if offset is not None:
                        terms[t] = terms[t] + offset * x.sums()
            if s.width % (UNIT * s.step.units):
                warp, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=SUMS) for axis in (1, 2))
                # of the warp's unit, or of the group: a row that ends within a unit has groups of 32
                mine = run + (RUNS * warp if s.step == WIDE else 4 * (column & 1) + (column >> 1))
                terms = [jnp.where(mine < begin, 0.0, term) for term in terms]
            return [y + term for y, term in zip(ys, terms, strict=True)]

        return lax.fori_loop(0, s.steps, one_step, [zero[jnp.float32]] * s.tokens)


class _Activations:
    """Limbs of a token for 8 groups of each warp's unit: of 32 elements, or of 16 of one half of it."""

    def __init__(self, given: Any, token: Any, step: Step, run: Any, half: int, group: int, interpret: bool):
        self.token, self.step, self.run, self.interpret = token, step, run, interpret
        self.wide, self.first = group == 32, 8 * half
        self.scales, (self.codes, self.parts) = given[0], given[group]
        self.loaded: dict[int, tuple[Array, ...]] = {}

    def _load(self, ref: Any, layout: Any, each: int, first: int, count: int, *part: int) -> Array:
        """`count` entries from a unit's `first` on, of which a run has `each`; the warps of TALL have the same ones."""
        if self.step == TALL:
            here, layout = (pl.ds(self.run * each + first, count),), layout.reduce((0,))
        else:
            here = pl.ds(lax.div(self.run, jnp.int32(RUNS)), WARPS), pl.ds(first, count)
        return load(ref.at[(self.token, *here, *part)], layout=layout)

    def limbs(self, s: int) -> tuple[Array, ...]:
        """Of groups 4 s to 4 s + 3, of each 16 elements."""
        if s not in self.loaded:
            parts = [(1, 4 * s, 4, u) for u in (0, 1)] if self.wide else [(2, self.first + 4 * s, 4)]
            self.loaded[s] = tuple(self._load(self.codes, LIMBS, *part) for part in parts)
        return self.loaded[s]

    def scale(self) -> Sums:
        of, first, count = (COLUMNS, 0, 4) if self.wide else (COUPLES, self.first // 2, 2)
        a, b = (self._load(self.scales, of, 1, first + count * s, count) for s in (0, 1))
        return self._spread(a, b, of)

    def sums(self) -> Sums:
        def group(s: int) -> Array:
            if not self.wide:
                return self._load(self.parts, COLUMNS, 2, self.first + 4 * s, 4)
            return self._load(self.parts, COLUMNS, 1, 4 * s, 4, 0) + self._load(self.parts, COLUMNS, 1, 4 * s, 4, 1)

        return self._spread(group(0), group(1), COLUMNS)

    def _spread(self, a: Array, b: Array, of: Any) -> Sums:
        return registers.spread(a, b, of if self.step == WIDE else of.reduce((0,)), interpret=self.interpret)
