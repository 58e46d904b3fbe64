"""How a warpgroup reads a packed weight a step at a time: 16 rows of 4 units, or 64 rows of one.

A warp has 16 rows of one unit either way, and what it holds has the same shape. Codes are copied to shared memory,
numbers that are none are loaded from where they lie.
"""

import math
from collections.abc import Sequence
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxinfer.pallas import registers
from jaxinfer.pallas.limbs import RUN
from jaxinfer.pallas.registers import HEAD_BYTES, HEADS, SUMS, WORDS, Heads, Sums, Words, bytes_layout, tiled
from jaxinfer.pallas.tiles import TILES, UNIT, Tile
from jaxinfer.quants import Format, Packed

load = partial(plgpu.load, optimized=False)
once: Any = cached_property  # which pyright takes for no attribute of a protocol


class Step(NamedTuple):
    """Rows and units that the four warps share."""

    rows: int
    units: int


WIDE, TALL = Step(16, 4), Step(64, 1)


def views(w: Packed, step: Step) -> dict[str, Array]:
    """The planes of a stack [..., F, D], as `copy` and `Loaded` index them.

    Codes are rows of bytes. Others are [tile of rows, row, unit, number of the unit], or [tile, warp, row, number of
    the row] where warps share the rows.
    """
    *lead, height, width = w.shape
    rows = math.prod(lead) * height
    of_a_row = (4, 16) if step == TALL else (16, width // UNIT)
    coded = dict(TILES[w.format.name].codes)
    return {
        name: p.reshape(rows, -1) if name in coded else p.reshape(rows // step.rows, *of_a_row, -1)
        for name, p in w.planes.items()
    }


def room(w: Packed, step: Step, steps: int) -> dict[str, Any]:
    """Shared memory for the codes of so many steps."""

    def of(name: str, size: int) -> Any:
        whole = math.gcd(size, size * w.shape[-1] // UNIT)  # rows that end within a unit are of smaller tiles
        return plgpu.SMEM((steps, step.rows, step.units * size), w.planes[name].dtype, transforms=tiled(whole, bits=8))

    return {name: of(name, size) for name, size in TILES[w.format.name].codes}


def copy(gmem: dict[str, Any], smem: dict[str, Any], full: Any, form: Format, step: Step, tile: Any, run: Any) -> None:
    """Begins to copy the codes of a step, whose elements begin with a run of 32; each plane arrives at `full`."""
    for name, size in TILES[form.name].codes:
        here = pl.ds(tile * step.rows, step.rows), pl.ds(run * (size * RUN // UNIT), step.units * size)
        plgpu.copy_gmem_to_smem(gmem[name].at[here], smem[name], full)


class Loaded:
    """A step of a tile of rows, see tiles.Unit; its codes are there once they were taken from shared memory.

    Numbers that are no codes and were `found` before, by `numbers` of this place, are not loaded again.
    """

    def __init__(
        self,
        gmem: dict[str, Any],
        form: Format,
        step: Step,
        tile: Any,
        run: Any,
        *,
        found: Sequence[Array] = (),
        interpret: bool,
    ):
        self.gmem, self.form, self.step, self.at, self.interpret = gmem, form, step, (tile, run), interpret
        needs = _needs(form) if found else ()
        self.found = {need[:2]: number for need, number in zip(needs, found, strict=True)}
        self.words: dict[str, tuple[Words, ...]] = {}
        self.heads: dict[tuple[str, int], Words] = {}

    @property
    def tile(self) -> Tile:
        return TILES[self.form.name]

    @once
    def t(self) -> Words:
        return plgpu.broadcasted_iota(jnp.int32, (16, 4, 4), 2, layout=WORDS)

    @once
    def column(self) -> Sums:
        return plgpu.broadcasted_iota(jnp.int32, (16, 4, 8), 2, layout=SUMS) >> 1

    def affine(self) -> list[tuple[Sums, Sums | None]]:
        """Scales and offsets of 8 groups of 32, or of those of 16 of each half."""
        return [self.tile.affine(self, half) for half in range(32 // self.tile.group)]

    def numbers(self) -> list[Array]:
        """What `affine` is made of, as it lies in memory."""
        return [self._read(*number) for number in _needs(self.form)]

    def take(self, smem: dict[str, Any]) -> None:
        """Loads the codes, which have arrived."""
        for name, size in self.tile.codes:
            codes = load(smem[name], layout=bytes_layout(size, self.step.rows))
            self.words[name] = registers.words(codes, interpret=self.interpret)

    def _load(self, plane: str, first: int, count: int | None, layout: Any) -> Array:
        """Numbers of a unit from the `first` on, or that one alone."""
        if (plane, first) not in self.found:
            self.found[plane, first] = self._read(plane, first, count, layout)
        return self.found[plane, first]

    def _read(self, plane: str, first: int, count: int | None, layout: Any) -> Array:
        tile, run = self.at
        if self.step == TALL:
            blocks = lax.div(run, jnp.int32(self.form.block // RUN))
            start = blocks * self.form.fields[plane].shape[0] + first
            here = self.gmem[plane].at[tile, :, :, start if count is None else pl.ds(start, count)]
            return load(here.transpose((1, 0) if count is None else (1, 0, 2)), layout=layout)
        numbers = first if count is None else pl.ds(first, count)
        unit = lax.div(run, jnp.int32(UNIT // RUN))
        return load(self.gmem[plane].at[tile, :, pl.ds(unit, 4), numbers], layout=layout)

    def _spread(self, a: Array, b: Array, of: Any) -> Sums:
        return registers.spread(a, b, of, interpret=self.interpret)

    def __call__(self, plane: str, i: int) -> Words:
        return self.words[plane][i]

    def head(self, plane: str, i: int) -> Words:
        if (plane, i) not in self.heads:
            word = lax.broadcast_in_dim(self.word(plane, i), (16, 4, 4), [0, 1])
            self.heads[plane, i] = plgpu.layout_cast(word, WORDS)
        return self.heads[plane, i]

    def lookup(self, x: Words, table: tuple[int, ...]) -> Words:
        return registers.lookup(x, table, interpret=self.interpret)

    def word(self, plane: str, i: int) -> Heads:
        return registers.head_word(self._load(plane, 4 * i, 4, HEAD_BYTES), interpret=self.interpret)

    def byte(self, plane: str, i: int) -> Heads:
        return self._load(plane, i, None, HEADS).astype(jnp.int32)

    def number(self, plane: str) -> Sums:
        d = self._load(plane, 0, None, HEADS).astype(jnp.float32)
        return self._spread(d, d, HEADS)

    def each(self, plane: str, dtype: DTypeLike) -> Sums:
        a, b = (self._load(plane, 4 * s, 4, WORDS).astype(dtype) for s in (0, 1))
        return self._spread(a, b, WORDS)

    def bytes(self, first: Heads, second: Heads) -> Sums:
        return (self._spread(first, second, HEADS) >> (8 * self.column)) & 0xFF

    def fields(self, word: Heads, width: int) -> Sums:
        return self._spread(word, word >> (4 * width), HEADS) >> (width * self.column)


type Need = tuple[str, int, int | None, Any]  # what Loaded._load takes


class _Asked(Loaded):
    """A step that is nowhere, and the numbers that were asked of it."""

    def __init__(self, form: Format):
        super().__init__({}, form, WIDE, 0, 0, interpret=True)
        self.asked: list[Need] = []

    def _load(self, plane: str, first: int, count: int | None, layout: Any) -> Array:
        self.asked.append((plane, first, count, layout))
        return jnp.zeros((16, 4) if count is None else (16, 4, count), self.form.fields[plane].base)


@cache
def _needs(form: Format) -> tuple[Need, ...]:
    """What `Loaded.affine` loads. That is traced apart from a kernel, which is lowered with all that it traces."""
    unit = _Asked(form)
    jax.eval_shape(unit.affine)
    return tuple(unit.asked)
