"""Products of a few tokens with packed weights, at the speed of memory (Hopper).

A warpgroup multiplies 16 rows of a weight, whose units of 256 elements its four warps share; or 64 rows, of which each
warp has 16, where rows are short or end within a unit. It stays for several such tiles. TMA copies codes ahead of it as
the file has them, over the ends of tiles, and scales are loaded a step ahead into registers. The tensor
cores multiply them with activations as two limbs of 8 bits, so that all sums within a group are exact. The 8 columns of
a product are both limbs of 4 groups: the codes of a group meet those of the other three in vain, but a scale is then
applied once a unit, by one thread. Every token has products of its own: its bits do not depend on the others. Narrow
activations have one limb, so that two tokens share a product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from jaxinfer.pallas.limbs import RUN, WHOLE, Limbs, Row, check, limbs
from jaxinfer.pallas.registers import COLUMNS, COUPLES, HEADS, LIMBS, SUMS, Sums
from jaxinfer.pallas.tiles import TILES, UNIT
from jaxinfer.pallas.units import TALL, WIDE, Loaded, Step, copy, load, room, views
from jaxinfer.quants import Format, Packed
from jaxinfer.tree import Index

WARPS, GROUPS, RUNS = 4, 8, UNIT // RUN  # warps of a warpgroup, groups of a unit or of its half, runs of a unit
STAGES = 2, 4  # steps in shared memory, at least and at most
PLACES, MEMORY = 4, 220 * 2**10  # warpgroups of a multiprocessor, and its shared memory
TOKENS = 4  # that share the reading of codes; more are other CTAs'
# Where rows are no wider, and reading them and their norm once a tile is no more bytes, CTAs make the limbs of their
# row themselves while their first codes arrive: 1.6 us for q, k, v of 4096 columns, where a launch before takes 2.3.
# Four scales are 16 bytes, which are loaded at once and must be aligned in shared memory: rows are whole fours of runs.
WIDEST, OWN, FOURS = 2**13, 10 * 2**20, 4 * RUN
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


@partial(jax.jit, static_argnames=("eps", "narrow", "combine", "dtype", "warpgroups", "ctas", "interpret"))
def product(
    x: Limbs | Float[Array, "M D"],
    weights: Sequence[Sequence[Packed]],
    layer: Index,
    *,
    norm: Float[Array, "R D"] | None = None,
    eps: float | None = None,
    narrow: bool = False,
    experts: Int[Array, " C"] | None = None,
    biases: Sequence[Sequence[Float[Array, "..."]]] | None = None,
    combine: Callable[..., Array] | None = None,
    residual: Float[Array, "C F"] | None = None,
    dtype: DTypeLike,
    warpgroups: int | None = None,
    ctas: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "C _"], ...]:
    """y = w[layer] x for the limbs of M = C tokens and each w [R, F, D], in one launch, summed in f32.

    Limbs of activations, which are normed before if there is an eps (see limbs.py), are made by each CTA for itself
    where they are few and have one token each, else by a launch before. `narrow` ones have 8 bits.

    A set of several weights of equal shapes gives one result, combine(y, ...). A single one gives y or, where there is
    something to combine, combine(first half of y, second half). `biases` [R, F], one for each weight, are added to its
    products before. The `residual` is added to the only result.

    With `experts`, weights are [R, E, F, D] and biases [R, E, F], and each of a token's A = C / M choices is a row:
    y[c] = w[layer, experts[c]] x[c // A]. Where there is no such expert nothing is read, and combined results are 0.

    As many CTAs as there is room for share the tiles of rows, or as many as `ctas`, for each token or few.

    Raises NotImplementedError for weights that are `beyond` the kernel, ValueError for shapes that do not fit.
    """
    m, axes = len(x.scale if isinstance(x, Limbs) else x), 3 if experts is None else 4
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
    tokens = min(m, TOKENS) if experts is None else 1  # of a CTA
    pairs = len(x.codes) < m if isinstance(x, Limbs) else narrow and tokens > 1
    if pairs:
        tokens += tokens % 2
    tiles, row = sum(heights) // step.rows, None
    if warpgroups is None:
        few = experts is None and tiles <= 2 * PROCESSORS and eps is None  # one makes a norm's sum of squares
        warpgroups = 2 if few and step == WIDE and width >= 2 * WARPS * UNIT else 1
    if ctas is None:
        ctas = -(-PLACES * PROCESSORS // (warpgroups * -(-c // tokens)))
    each_tiles = -(-tiles // ctas)
    ctas = -(-tiles // each_tiles)  # of which the last may have fewer
    given: Any = x
    if not isinstance(x, Limbs):
        check(x, norm, eps)
        few = tokens == 1 and c * tiles * width * (2 if norm is None else 6) <= OWN
        if few and width <= WIDEST and width % FOURS == 0:
            row = Row(width, x.dtype)
            given = row.view(x), x, None if norm is None else row.view(norm)
        else:
            x = jnp.pad(x, ((0, m % 2), (0, 0))) if pairs else x
            given = limbs(x, norm, layer, eps, narrow=narrow, pairs=pairs, interpret=interpret)
    each_weight = [[w for w in one for _ in range(n)] for one, n in zip(weights, parts, strict=True)]
    sizes = [
        step.rows * step.units * size for one in each_weight for w in one for _, size in TILES[w.format.name].codes
    ]
    free = MEMORY * warpgroups // PLACES - (3 * width if row else 0)
    depth = min(max(free // (warpgroups * sum(sizes)), STAGES[0]), STAGES[1], steps * each_tiles)
    pad = -c % tokens

    def fill(a: Array, rows: int) -> Array:
        return jnp.pad(a, ((0, rows - len(a)), *((0, 0),) * (a.ndim - 1)))

    if row is None:
        rows_of_codes = (m + pad) // 2 if pairs else m + pad
        given = Limbs(fill(given.codes, rows_of_codes), fill(given.scale, m + pad), fill(given.sums, m + pad))
        given = _views(given, m + pad, step, width, pairs)
    of_tile, row_layout = ((WARPS, 16), HEADS) if step == TALL else ((16,), PARTIAL)
    planes = [[views(w, step) for w in one] for one in weights]
    biases = [[b.reshape(-1, *of_tile) for b in one] for one in biases or ()]
    if residual is not None:
        residual = fill(residual, c + pad).reshape(c + pad, -1, *of_tile)

    def rows(ref: Any, *index: Any) -> Any:
        """Those of a tile, as in `row_layout`."""
        return ref.at[index].transpose((1, 0)) if step == TALL else ref.at[index]

    def make_limbs(row: Row, wg: Any, layer: Any, token: Any, given_gmem: Any, out: Limbs, met: Any) -> None:
        """The parts of a row are dealt to warpgroups; all is loaded before any of it is needed."""
        view_gmem, row_gmem, norm_gmem = given_gmem
        parts = [wg + warpgroups * i for i in range(-(-row.parts // warpgroups))]
        there = [jnp.minimum(part, row.parts - 1) for part in parts] if warpgroups > 1 else parts
        xs = [row.load(view_gmem.at[token], part) for part in there]
        rms = None if eps is None else row.inverse_rms(row_gmem.at[token], eps)
        ws = [None if norm_gmem is None else row.load(norm_gmem.at[layer], part) for part in there]
        for part, x, w in zip(parts, xs, ws, strict=True):
            one = partial(row.make, part, x, rms, w, out, partial(registers.write, interpret=interpret), narrow=narrow)
            registers.when(part < row.parts if row.parts % warpgroups and part is parts[-1] else True, one)
        registers.meet(interpret=interpret)
        if warpgroups > 1:
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

    def few_products(layer_gmem, experts_gmem, given_gmem, planes_gmem, biases_gmem, residual_gmem, *rest):
        *outs_gmem, smem, full, met, sums_smem, spare_smem, made_smem = rest
        cta, first = lax.axis_index("cta"), lax.axis_index("row") * tokens
        wg = lax.axis_index("wg") if warpgroups > 1 else 0
        stack, own_steps, chosen = layer_gmem[0], lax.div(steps - 1 - wg, warpgroups) + 1, True
        if experts is not None:
            expert, count = experts_gmem[first], weights[0][0].shape[1]
            chosen = (expert >= 0) & (expert < count)
            stack, own_steps = stack * count + jnp.where(chosen, expert, 0), jnp.where(chosen, own_steps, 0)
        token = lax.div(first, jnp.int32(c // m))
        share = _Share(
            step, width, given_gmem, token, tokens, own_steps, wg, warpgroups, depth, pairs, spare_smem, interpret
        )

        def work(share: _Share, i: int) -> list[_Rows]:
            """Of each weight of a set the tiles that this CTA has."""
            n, height, before = parts[i], heights[i] // step.rows, sum(heights[:i]) // step.rows
            start, stop = (jnp.clip((cta + end) * each_tiles - before, 0, height) for end in (0, 1))
            each = [
                (w, (stack * n + part) * height, p)
                for w, p in zip(weights[i], planes_gmem[i], strict=True)
                for part in range(n)
            ]
            return [
                _Rows(share, w.format, p, here, ready, base, start, stop)
                for (w, base, p), here, ready in zip(each, smem[i], full[i], strict=True)
            ]

        def one_set(i: int) -> None:
            many = work(share, i)
            # By turns the scales of one arrive during a step of the other; several tokens leave no registers for that.
            turns = [many] if tokens == 1 else [[one] for one in many]

            def one_tile(tile: Array, raw: list[list[Array]]) -> list[list[Array]]:
                zero, buffer = plgpu.layout_cast(jnp.zeros((16, WARPS, GROUPS), jnp.float32), SUMS), lax.rem(tile, 2)

                def one_step(some: list[_Rows], i: Any, carry: list[tuple[list[Sums], list[Array]]]) -> list[Any]:
                    return [one.add(tile, i, *own) for one, own in zip(some, carry, strict=True)]

                found: list[tuple[list[Sums], list[Array]]] = []
                for some in turns:
                    own = [([zero] * tokens, one) for one in raw[len(found) :][: len(some)]]
                    found += lax.fori_loop(0, own_steps, partial(one_step, some), own)
                for k, (ys, _) in enumerate(found):
                    for t, y in enumerate(ys):
                        sums_smem[buffer, k, wg, t] = y.sum(axis=2)
                registers.meet(interpret=interpret)
                if warpgroups > 1:
                    plgpu.barrier_arrive(met)
                    plgpu.barrier_wait(met)
                registers.when(wg == 0, partial(finish, i, tile, buffer, [one.base + tile for one in many]))
                return [following for _, following in found]

            lax.fori_loop(many[0].start, many[0].stop, one_tile, [one.ahead(one.start, 0) for one in many])

        def finish(i: int, tile: Array, buffer: Array, entries: list[Array]) -> None:
            def total(k: int, t: int) -> Array:
                warps = [()] if step == TALL else [(slice(None), w) for w in range(WARPS)]
                places = [(buffer, k, g, t, *w) for g in range(warpgroups) for w in warps]
                found = [load(sums_smem.at[place], layout=row_layout) for place in places]
                y = sum(found[1:], found[0])
                if not biases:
                    return y
                return y + load(rows(biases_gmem[i][k // parts[i]], entries[k]), layout=row_layout).astype(jnp.float32)

            for t in range(tokens):
                where, ys = (first + t, tile), [total(k, t) for k in range(len(entries))]
                y = ys[0] if combine is None else combine(*ys)
                if experts is not None:
                    y = jnp.where(chosen, y, 0.0)
                if residual is not None:
                    y = y + load(rows(residual_gmem, *where), layout=row_layout).astype(jnp.float32)
                registers.store(rows(outs_gmem[i], *where), y.astype(dtype))

        for i in range(len(weights)):
            for one in work(share, i):
                one.begin()
        if row is not None:
            make_limbs(row, wg, layer_gmem[0], token, given_gmem, Limbs(*made_smem), met)
            made = Limbs(*(registers.readable(ref, interpret=interpret) for ref in made_smem))
            share = replace(share, given=_views(made, 1, step, width), first_token=0)
        for i in range(len(weights)):
            one_set(i)

    def barriers(w: Packed) -> Any:
        return plgpu.Barrier(num_arrivals=len(TILES[w.format.name].codes), num_barriers=warpgroups * depth)

    runs = width // RUN
    limbs_room: Any = [((runs, 2, 2, 4), jnp.int32), ((runs,), jnp.float32), ((runs, 2), jnp.float32)] if row else []
    outs = plgpu.kernel(
        few_products,
        out_type=tuple(jax.ShapeDtypeStruct((c + pad, n // step.rows, *of_tile), dtype) for n in heights),
        grid=((c + pad) // tokens, ctas),
        grid_names=("row", "cta"),
        **({"num_threads": warpgroups, "thread_name": "wg"} if warpgroups > 1 else {}),
        scratch_types=[
            [[room(w, step, warpgroups * depth) for w in one] for one in each_weight],
            [[barriers(w) for w in one] for one in each_weight],
            plgpu.Barrier(num_arrivals=warpgroups),
            plgpu.SMEM((2, max(map(len, each_weight)), warpgroups, tokens, 16, WARPS), jnp.float32),
            plgpu.SMEM((1,), jnp.int32),
            [plgpu.SMEM(*one) for one in limbs_room],
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        experts,
        given,
        planes,
        biases,
        residual,
    )
    return tuple(o.reshape(c + pad, -1)[:c] for o in outs)


def _views(x: Limbs, m: int, step: Step, width: int, pairs: bool = False) -> dict[int, Any]:
    """Scales, and codes and sums by groups of 16 and of 32: of a token, or of each of its units that warps share.

    Of arrays, or of refs.
    """
    of_row = (width // RUN,) if step == TALL else (width // UNIT, RUNS)
    of_codes, of_token, runs = (m // 2 if pairs else m, *of_row[:-1]), (m, *of_row[:-1]), of_row[-1]
    return {
        0: x.scale.reshape(*of_token, runs),
        16: [x.codes.reshape(*of_codes, 2 * runs, 2, 4), x.sums.reshape(*of_token, 2 * runs)],
        32: [x.codes.reshape(*of_codes, runs, 2, 2, 4), x.sums.reshape(*of_token, runs, 2)],
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
    pairs: bool
    spare: Any
    interpret: bool


@dataclass(frozen=True)
class _Rows:
    """Tiles of rows of a weight, from one to before another, times the tokens."""

    share: _Share
    form: Format
    planes: dict[str, Any]
    smem: dict[str, Any]
    full: Any
    base: Any  # the first tile of the layer, or of its expert
    start: Any
    stop: Any

    def _run(self, i: Any) -> tuple[Any, Any]:
        """The run that a tile's i-th step is for, and the one that it begins with lest it passes the end."""
        s = self.share
        runs = RUNS * s.step.units
        begin = (s.wg + i * s.warpgroups) * runs
        return begin, jnp.minimum(begin, s.width // RUN - runs)

    def _slot(self, n: Any) -> Any:
        return self.share.wg * self.share.depth + lax.rem(n, self.share.depth)

    def _room(self, slot: Any) -> dict[str, Any]:
        return {name: ref.at[slot] for name, ref in self.smem.items()}

    def _copy(self, n: Any) -> None:
        """Begins to copy the n-th step of all tiles, if there is one."""
        s, slot = self.share, self._slot(n)

        def begin() -> None:
            tile, i = self.start + lax.div(n, s.steps), lax.rem(n, s.steps)
            _, run = self._run(i)
            copy(self.planes, self._room(slot), self.full.at[slot], self.form, s.step, self.base + tile, run)

        registers.when(n < s.steps * (self.stop - self.start), begin)

    def begin(self) -> None:
        for n in range(self.share.depth):
            self._copy(jnp.int32(n))

    def _loaded(self, tile: Any, i: Any, found: Sequence[Array] = ()) -> Loaded:
        s, (_, run) = self.share, self._run(i)
        return Loaded(self.planes, self.form, s.step, self.base + tile, run, found=found, interpret=s.interpret)

    def ahead(self, tile: Any, i: Any) -> list[Array]:
        """What scales are made of in a tile's i-th step, as it lies in memory; some other if there is no such tile."""
        return self._loaded(jnp.minimum(tile, jnp.maximum(self.stop - 1, 0)), i).numbers()

    def add(self, tile: Any, i: Any, ys: list[Sums], raw: list[Array]) -> tuple[list[Sums], list[Array]]:
        """Each token's sums of every row, warp and column after a tile's i-th step, and what is `ahead` of the next."""
        s, form, interpret = self.share, TILES[self.form.name], self.share.interpret
        shape, narrow = (16, WARPS, GROUPS), form.group == 16
        zero = {d: plgpu.layout_cast(jnp.zeros(shape, d), SUMS) for d in (jnp.int32, jnp.float32)}
        (begin, run), n = self._run(i), (tile - self.start) * s.steps + i
        unit, slot, last = self._loaded(tile, i, raw), self._slot(n), i + 1 == s.steps
        following = self.ahead(jnp.where(last, tile + 1, tile), jnp.where(last, 0, i + 1))
        plgpu.barrier_wait(self.full.at[slot])
        unit.take(self._room(slot))
        registers.landed([w for words in unit.words.values() for w in words], s.spare, interpret=interpret)
        self._copy(n + s.depth)
        affine = unit.affine()
        codes = [form.values(unit, i) for i in range(16)]
        terms = [zero[jnp.float32]] * s.tokens
        each = 2 if s.pairs else 1  # tokens of a product
        for half, (scale, offset) in enumerate(affine):
            for t in range(0, s.tokens, each):
                xs = [
                    _Activations(s.given, s.first_token + t + i, each, s.step, run, half, form.group, interpret)
                    for i in range(each)
                ]
                zs = (zero[jnp.int32],) * each
                for first in range(0, GROUPS, 4):
                    groups = range(first, first + 4)
                    a = [tuple(codes[8 * half + g :][:1] if narrow else codes[2 * g :][:2]) for g in groups]
                    zs = registers.products(zs, a, xs[0].limbs(first // 4), first // 4, interpret=interpret)
                for j, (x, z) in enumerate(zip(xs, zs, strict=True), t):
                    terms[j] = terms[j] + scale * x.scale() * z.astype(jnp.float32)
                    if offset is not None:
                        terms[j] = terms[j] + offset * x.sums()
        if s.width % (UNIT * s.step.units):
            warp, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=SUMS) for axis in (1, 2))
            # of the warp's unit, or of the group: a row that ends within a unit has groups of 32
            mine = run + (RUNS * warp if s.step == WIDE else 4 * (column & 1) + (column >> 1))
            terms = [jnp.where(mine < begin, 0.0, term) for term in terms]
        return [y + term for y, term in zip(ys, terms, strict=True)], following


class _Activations:
    """Limbs of a token for 8 groups of each warp's unit: of 32 elements, or of 16 of one half of it.

    Codes are of `each` tokens.
    """

    def __init__(self, given: Any, token: Any, each: int, step: Step, run: Any, half: int, group: int, interpret: bool):
        self.token, self.step, self.run, self.interpret = token, step, run, interpret
        self.place = token if each == 1 else lax.div(token, jnp.int32(each))
        self.wide, self.first = group == 32, 8 * half
        self.scales, (self.codes, self.parts) = given[0], given[group]
        self.loaded: dict[int, tuple[Array, ...]] = {}

    def _load(self, row: Any, ref: Any, layout: Any, each: int, first: int, count: int, *part: int) -> Array:
        """`count` entries from a unit's `first` on, of which a run has `each`; the warps of TALL have the same ones."""
        if self.step == TALL:
            here, layout = (pl.ds(self.run * each + first, count),), layout.reduce((0,))
        else:
            here = pl.ds(lax.div(self.run, jnp.int32(RUNS)), WARPS), pl.ds(first, count)
        return registers.load(ref, (row, *here, *part), layout)

    def limbs(self, s: int) -> tuple[Array, ...]:
        """Of groups 4 s to 4 s + 3, of each 16 elements."""
        if s not in self.loaded:
            parts = [(1, 4 * s, 4, u) for u in (0, 1)] if self.wide else [(2, self.first + 4 * s, 4)]
            self.loaded[s] = tuple(self._load(self.place, self.codes, LIMBS, *part) for part in parts)
        return self.loaded[s]

    def scale(self) -> Sums:
        of, first, count = (COLUMNS, 0, 4) if self.wide else (COUPLES, self.first // 2, 2)
        a, b = (self._load(self.token, self.scales, of, 1, first + count * s, count) for s in (0, 1))
        return self._spread(a, b, of)

    def sums(self) -> Sums:
        def group(s: int) -> Array:
            if not self.wide:
                return self._load(self.token, self.parts, COLUMNS, 2, self.first + 4 * s, 4)
            first, second = (self._load(self.token, self.parts, COLUMNS, 1, 4 * s, 4, u) for u in (0, 1))
            return first + second

        return self._spread(group(0), group(1), COLUMNS)

    def _spread(self, a: Array, b: Array, of: Any) -> Sums:
        return registers.spread(a, b, of if self.step == WIDE else of.reduce((0,)), interpret=self.interpret)
