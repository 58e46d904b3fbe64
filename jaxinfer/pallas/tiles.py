"""How the kernels read each weight format: bit operations on words as the file has them, a unit of a row at a time.

`quants.decode` defines the values. Here they are factored: an element is scale * code + offset, with a code of a byte
that the tensor cores multiply, and a scale and an offset for each group of elements.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxinfer.pallas.registers import Heads, Sums, Words
from jaxinfer.quants import E2M1_TWICE, IQ4

UNIT = 256  # elements: of all formats whole blocks


@runtime_checkable
class Unit(Protocol):
    """16 rows of 4 units, one for each warp: codes in shared memory, the rest in the device's.

    Columns stand for groups: 2 t + s for group 4 s + t of the 8 of a unit, or of a half of one with 16.
    """

    t: Words  # of a thread

    def __call__(self, plane: str, i: int) -> Words:
        """The i-th 16 bytes of codes, 4 a thread."""
        ...

    def head(self, plane: str, i: int) -> Words:
        """The i-th word of a plane that is no code, all of it for every thread."""
        ...

    def lookup(self, x: Words, table: tuple[int, ...]) -> Words:
        """The signed byte table[i] for each byte i."""
        ...

    def word(self, plane: str, i: int) -> Heads:
        """The i-th word of a plane that is no code."""
        ...

    def byte(self, plane: str, i: int) -> Heads:
        """Its i-th byte."""
        ...

    def number(self, plane: str) -> Sums:
        """The only number of a unit."""
        ...

    def each(self, plane: str, dtype: DTypeLike) -> Sums:
        """A number of each group."""
        ...

    def bytes(self, first: Heads, second: Heads) -> Sums:
        """Byte t of the first word in columns 2 t, of the second in columns 2 t + 1."""
        ...

    def fields(self, word: Heads, width: int) -> Sums:
        """Each group's bits of a word and those above, for `width` bits a group."""
        ...


type Affine = tuple[Sums, Sums | None]  # f32


@dataclass(frozen=True)
class Tile:
    """How one format is read.

    codes: planes that are copied to shared memory, with their bytes of a unit. group: elements of a scale, 32 or 16.
    values(unit, i): the signed bytes of the i-th 16 elements. affine(unit, half): scales and offsets of 8 groups.
    """

    codes: tuple[tuple[str, int], ...]
    group: int
    values: Callable[[Unit, int], Words]
    affine: Callable[[Unit, int], Affine]


def _bits_from(words: Words, right: int, mask: int) -> Words:
    """The bits of a mask, after a shift to the right, or to the left."""
    return ((words >> right if right >= 0 else words << -right) if right else words) & mask


def _nibble(words: Words, high: int) -> Words:
    return _bits_from(words, 4 * high, 0x0F0F0F0F)


def _nibbles_of_32(unit: Unit, i: int) -> Words:
    """Blocks of 32 in 16 bytes: the low nibbles come first."""
    return _nibble(unit("qs", i // 2), i % 2)


def _nibbles_of_64(unit: Unit, i: int) -> Words:
    """Pairs of groups of 32 in 32 bytes: the low nibbles are the first group's."""
    return _nibble(unit("qs", i // 4 * 2 + i % 2), i // 2 % 2)


def _fifth_bits(unit: Unit, i: int) -> Words:
    """Bits of a block's 32 in a word: the 4 of a thread go to bit 4 of its bytes."""
    four = (unit.head("qh", i // 2) >> (16 * (i % 2) + 4 * unit.t)) & 15
    return ((four * 0x00204081) & 0x01010101) << 4  # bit j times 2^(7 j) is bit 8 j


def _q5_of_32(unit: Unit, i: int) -> Words:
    return _nibbles_of_32(unit, i) | _fifth_bits(unit, i)


def _q5_k(unit: Unit, i: int) -> Words:
    return _nibbles_of_64(unit, i) | _bits_from(unit("qh", i % 2), i // 2 - 4, 0x10101010)


def _q6_k(unit: Unit, i: int) -> Words:
    half, quarter, part = i // 8, i // 2 % 4, i % 2
    low = _nibble(unit("ql", 4 * half + quarter % 2 * 2 + part), quarter // 2)
    return low | _bits_from(unit("qh", 2 * half + part), 2 * quarter - 4, 0x30303030)


def _q2_k(unit: Unit, i: int) -> Words:
    return _bits_from(unit("qs", i // 8 * 2 + i % 2), i // 2 % 4 * 2, 0x03030303)


def _q3_k(unit: Unit, i: int) -> Words:
    return _q2_k(unit, i) | _bits_from(unit("hmask", i % 2), i // 2 - 2, 0x04040404)


def _table(values: tuple[int, ...], nibbles: Callable[[Unit, int], Words]) -> Callable[[Unit, int], Words]:
    return lambda unit, i: unit.lookup(nibbles(unit, i), values)


def _scaled(offset: int) -> Callable[[Unit, int], Affine]:
    def affine(unit: Unit, half: int) -> Affine:
        d = unit.each("d", jnp.float32)
        return d, None if offset == 0 else offset * d

    return affine


def _with_minimum(unit: Unit, half: int) -> Affine:
    return unit.each("d", jnp.float32), unit.each("m", jnp.float32)


def _k_pairs(unit: Unit, half: int) -> Affine:
    """8 scales and 8 minima of 6 bits in 12 bytes: the last four of each lie in two places, see quants._k_scales."""
    low, high = 0x0F0F0F0F, 0x30303030
    first, second, third = (unit.word("scales", i) for i in range(3))
    scales = first & 0x3F3F3F3F, (third & low) | ((first >> 2) & high)
    minima = second & 0x3F3F3F3F, ((third >> 4) & low) | ((second >> 2) & high)
    scale = unit.number("d") * _float(unit.bytes(*scales))
    return scale, -unit.number("dmin") * _float(unit.bytes(*minima))


def _q6_affine(unit: Unit, half: int) -> Affine:
    scale = unit.number("d") * _float(_signed(_pair(unit, "scales", 2 * half)))
    return scale, -32 * scale


def _q2_affine(unit: Unit, half: int) -> Affine:
    both = _pair(unit, "scales", 2 * half)
    return unit.number("d") * _float(both & 15), -unit.number("dmin") * _float(both >> 4)


def _q3_affine(unit: Unit, half: int) -> Affine:
    """16 scales of 6 bits, less 32: 4 of each in the nibbles of 8 bytes, 2 in 4 bytes."""
    low = unit.bytes(*(unit.word("scales", i) >> (4 * half) for i in (0, 1))) & 15
    third = unit.word("scales", 2)
    high = unit.bytes(*(third >> (2 * (2 * half + i)) for i in (0, 1))) & 3
    scale = unit.number("d") * (_float(low | (high << 4)) - 32)
    return scale, -4 * scale


def _iq4_xs_affine(unit: Unit, half: int) -> Affine:
    """8 scales of 6 bits, less 32: 4 of each in a word, 2 in two bytes."""
    low = unit.fields(unit.word("scales_l", 0), 4) & 15
    high = unit.fields(unit.byte("scales_h", 0) | (unit.byte("scales_h", 1) << 8), 2) & 3
    return unit.number("d") * (_float(low | (high << 4)) - 32), None


def _mxfp4_affine(unit: Unit, half: int) -> Affine:
    """2^(e - 128), of which two are subnormal."""
    e = unit.each("e", jnp.int32)
    bits = jnp.where(e < 2, 0x00200000 << e, (e - 1) << 23)
    return lax.bitcast_convert_type(bits, jnp.float32), None


def _pair(unit: Unit, plane: str, i: int) -> Array:
    return unit.bytes(unit.word(plane, i), unit.word(plane, i + 1))


def _signed(byte: Array) -> Array:
    return (byte << 24) >> 24


def _float(x: Array) -> Array:
    return x.astype(jnp.float32)


_QS = (("qs", 128),)
TILES = {
    "Q4_0": Tile(_QS, 32, _nibbles_of_32, _scaled(-8)),
    "Q4_1": Tile(_QS, 32, _nibbles_of_32, _with_minimum),
    "Q5_0": Tile(_QS, 32, _q5_of_32, _scaled(-16)),
    "Q5_1": Tile(_QS, 32, _q5_of_32, _with_minimum),
    "Q8_0": Tile((("qs", 256),), 32, lambda unit, i: unit("qs", i), _scaled(0)),
    "Q2_K": Tile((("qs", 64),), 16, _q2_k, _q2_affine),
    "Q3_K": Tile((("qs", 64), ("hmask", 32)), 16, _q3_k, _q3_affine),
    "Q4_K": Tile(_QS, 32, _nibbles_of_64, _k_pairs),
    "Q5_K": Tile((("qs", 128), ("qh", 32)), 32, _q5_k, _k_pairs),
    "Q6_K": Tile((("ql", 128), ("qh", 64)), 16, _q6_k, _q6_affine),
    "IQ4_NL": Tile(_QS, 32, _table(IQ4, _nibbles_of_32), _scaled(0)),
    "IQ4_XS": Tile(_QS, 32, _table(IQ4, _nibbles_of_32), _iq4_xs_affine),
    "MXFP4": Tile(_QS, 32, _table(E2M1_TWICE, _nibbles_of_32), _mxfp4_affine),
}
