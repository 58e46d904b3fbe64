"""Activations as integers of two signed 8-bit limbs, or of one, with a scale for each run of 32, for int8 tensor cores.

A warpgroup makes a few runs at a time, in a launch or within the product that takes them. Where there is a norm, it
adds up the squares of the whole row for itself, in an order that is given by the row's length, which takes less time
than another launch.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu.fragmented_array import Replicated
from jaxtyping import Array, Float, Int

from jaxinfer.layers.norm import rms_norm
from jaxinfer.pallas import registers
from jaxinfer.tree import Index, pytree

RUN, PART = 32, 16  # elements of a scale, of a sum
BITS, LEAST = 13, -100  # the exponent of the largest integer of a run; the least exponent of a scale
NARROW = 7  # bits that narrow integers have less than others
ROUND = 1.5 * 2**23  # added to an f32 it leaves the nearest integer, to even, in the last bits
WHOLE, MOST, THREADS = 64, 512, 128  # what divides a row; elements of a part, at most; threads that make it


@pytree
class Limbs:
    """y = scale * (256 high + low) for M tokens of D = 32 r = 16 n elements.

    A run whose largest magnitude is a has the scale 2^max(floor(log2 a) - 13, -100): integers are rounded half to even
    and reach 2^14, and bf16 is exact down to 2^-6 a. What is subnormal is 0, on devices that flush it and others. A run
    with an infinity or a nan has the scale nan, and nan as its sums; its codes mean nothing.

    Narrow integers are multiples of 2^7, from -128 to 127 of them: the 8 bits of MXINT8 (OCP Microscaling Formats 1.0),
    which is llama.cpp's Q8_1 with powers of 2 as scales. In pairs of tokens these numbers are the codes, and scales are
    theirs: those of a token take the place of the high limbs, those of the next that of the low ones.
    """

    codes: Int[
        Array, "P n 2 4"
    ]  # int32, little-endian: of each 16 elements the high limbs, then the low; P is M or M/2
    scale: Float[Array, "M r"]  # f32
    sums: Float[Array, "M n"]  # f32: scale times the sum of 16 integers, which is exact where it is finite


def limbs_reference(
    x: Float[Array, "M D"],
    norm: Float[Array, "R D"] | None,
    layer: Index,
    eps: float | None,
    *,
    narrow: bool = False,
    pairs: bool = False,
) -> Limbs:
    """Limbs of rms_norm(x, norm[layer], eps), rounded to x's dtype, or of x where eps is None."""
    m, width = x.shape
    y = x if eps is None else rms_norm(x, None if norm is None else norm[layer], eps)
    n, scale = _integers(y, narrow)
    if pairs:
        both = (n >> NARROW).reshape(m // 2, 2, -1, PART).swapaxes(1, 2)
    else:
        low = ((n + 128) & 255) - 128
        both = jnp.stack([(n - low) >> 8, low], axis=2).reshape(m, -1, 2, 2, PART).swapaxes(2, 3)
    codes = lax.bitcast_convert_type(both.astype(jnp.int8).reshape(len(both), width // PART, 2, 4, 4), jnp.int32)
    sums = n.reshape(m, -1, 2, PART).sum(axis=3).astype(jnp.float32) * scale[..., None]
    return Limbs(codes, scale * 2.0**NARROW if pairs else scale, sums.reshape(m, -1))


def narrowed(x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """x as narrow integers have it, which bf16 holds exactly."""
    n, scale = _integers(x.reshape(-1, x.shape[-1]), True)
    return (n.astype(jnp.float32) * scale[..., None]).astype(x.dtype).reshape(x.shape)


def _integers(x: Float[Array, "M D"], narrow: bool) -> tuple[Int[Array, "M r 32"], Float[Array, "M r"]]:
    y = x.astype(jnp.float32).reshape(len(x), -1, RUN)
    scale, inverse = _scale(_bits(jnp.abs(y)).max(axis=2))  # of floats XLA's CPU code may drop a nan
    y = y * inverse[..., None]
    n = jnp.minimum(jnp.round(y * 2.0**-NARROW), 127) * 2.0**NARROW if narrow else jnp.round(y)
    return n.astype(jnp.int32), scale


def _bits(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    return lax.bitcast_convert_type(x, jnp.int32)


def _scale(largest: Int[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """A run's scale, and its inverse, from the bits of its largest magnitude: powers of 2, made of bits."""
    exponent = largest >> 23
    field = jnp.maximum(exponent - BITS, 127 + LEAST)
    scale, inverse = (lax.bitcast_convert_type(e << 23, jnp.float32) for e in (field, 254 - field))
    return jnp.where(exponent == 255, jnp.nan, scale), inverse


class Row:
    """How a warpgroup makes the limbs of a row of D elements, a part of it at a time, inside a kernel."""

    def __init__(self, width: int, dtype: Any):
        self.width, self.dtype, size = width, dtype, math.gcd(width, MOST)
        self.parts, self.runs = width // size, size // RUN
        self.shape = self.runs, 2, 4, 4  # of a part: run, half of it, word, byte
        vector = max(size // THREADS, 1)
        # Two warps make the same where a part has two runs only.
        warps = (-8,) if self.runs > 2 else (-8, Replicated(2))
        tiles = [self.shape, (max(self.runs // 4, 1), 2, 4, vector)]
        self.layout = registers.layout(tiles, warps, (-4, -3, -2, -5))
        if width % THREADS:  # each warp has the whole row
            self.whole = registers.layout([(size,), (size // 32,)], (Replicated(4),), (-2,))
        else:
            vector = math.gcd(width // THREADS, 16 // jnp.dtype(dtype).itemsize)
            self.whole = plgpu.Layout.WG_STRIDED((width,), vec_size=vector)

    def view(self, x: Float[Array, "n D"]) -> Float[Array, "n r 2 4 4"]:
        return x.reshape(len(x), -1, *self.shape[1:])

    def here(self, part: Any) -> Any:
        return pl.ds(part * self.runs, self.runs)

    def load(self, ref: Any, part: Any) -> Float[Array, "r 2 4 4"]:
        """Of a row as it is viewed."""
        return plgpu.load(ref.at[self.here(part)], layout=self.layout, optimized=False)

    def inverse_rms(self, ref: Any, eps: float) -> Float[Array, ""]:
        """Of a row [D]."""
        row = plgpu.load(ref, layout=self.whole, optimized=False).astype(jnp.float32)
        return lax.rsqrt((row * row).sum() * (1 / self.width) + eps)

    def make(
        self,
        part: Any,
        x: Array,
        rms: Array | None,
        weight: Array | None,
        out: Limbs,
        write: Callable[[Any, Array, Any], None] = lambda ref, value, layout: registers.store(ref, value),
        *,
        narrow: bool = False,
        of_pair: Any = None,
    ) -> None:
        """Limbs of a part that was loaded, with its norm's weight, for the refs [r, 2, 2, 4], [r], [r, 2] of a row.

        They are written by write(ref, value, its layout). `of_pair` says which of two tokens it is.
        """
        y = x.astype(jnp.float32)
        if rms is not None:
            y = y * rms
            y = (y if weight is None else y * weight.astype(jnp.float32)).astype(self.dtype).astype(jnp.float32)
        scale, inverse = _scale(_bits(jnp.abs(y).max(axis=3).max(axis=2).max(axis=1)))
        y = y * self._across(inverse, 4)
        bits = _bits((jnp.minimum(y * 2.0**-NARROW, 127.0) if narrow else y) + ROUND)
        n = bits - _bits(jnp.float32(ROUND))
        shift = plgpu.broadcasted_iota(jnp.int32, self.shape, 3, layout=self.layout) << 3
        here = self.here(part)
        whole = n << NARROW if narrow else n
        limbs = ((0, (whole + 128) >> 8), (1, whole)) if of_pair is None else ((of_pair, n),)
        for place, limb in limbs:
            write(out.codes.at[here, :, place], ((limb & 255) << shift).sum(axis=3), self.layout.reduce((3,)))
        sums = whole.sum(axis=3).sum(axis=2).astype(jnp.float32) * self._across(scale, 2)
        write(out.scale.at[here], scale if of_pair is None else scale * 2.0**NARROW, self.layout.reduce((1, 2, 3)))
        write(out.sums.at[here], sums, self.layout.reduce((2, 3)))

    def _across(self, run: Array, dims: int) -> Array:
        """A run's number for each of its elements, or halves."""
        out = lax.broadcast_in_dim(run, self.shape[:dims], [0])
        return plgpu.layout_cast(out, self.layout.reduce(tuple(range(dims, 4))))


@partial(jax.jit, static_argnames=("eps", "narrow", "pairs", "interpret"))
def limbs(
    x: Float[Array, "M D"],
    norm: Float[Array, "R D"] | None,
    layer: Index,
    eps: float | None,
    *,
    narrow: bool = False,
    pairs: bool = False,
    interpret: bool = False,
) -> Limbs:
    """`limbs_reference` in one launch for sm_80, 89 and 90; a row's bits do not depend on the others.

    Raises what `check` does.
    """
    check(x, norm, eps)
    m, width = x.shape
    row, r = Row(width, x.dtype), width // RUN

    def make_limbs(layer_gmem, view_gmem, x_gmem, norm_gmem, codes_gmem, scale_gmem, sums_gmem):
        token, part = lax.axis_index("token"), lax.axis_index("part")
        y = row.load(view_gmem.at[token], part)
        rms = None if eps is None else row.inverse_rms(x_gmem.at[token], eps)
        weight = None if norm_gmem is None else row.load(norm_gmem.at[layer_gmem[0]], part)  # last: it waits for layer
        place, of_pair = (lax.div(token, 2), lax.rem(token, 2)) if pairs else (token, None)
        out = Limbs(codes_gmem.at[place], scale_gmem.at[token], sums_gmem.at[token])
        row.make(part, y, rms, weight, out, narrow=narrow, of_pair=of_pair)

    codes, scale, sums = plgpu.kernel(
        make_limbs,
        out_type=[
            jax.ShapeDtypeStruct((m // 2 if pairs else m, r, 2, 2, 4), jnp.int32),
            jax.ShapeDtypeStruct((m, r), jnp.float32),
            jax.ShapeDtypeStruct((m, r, 2), jnp.float32),
        ],
        grid=(m, row.parts),
        grid_names=("token", "part"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(jnp.asarray(layer, jnp.int32).reshape(1), row.view(x), x, None if norm is None else row.view(norm))
    return Limbs(codes.reshape(-1, 2 * r, 2, 4), scale, sums.reshape(m, 2 * r))


def check(x: Float[Array, "M D"], norm: Float[Array, "R D"] | None, eps: float | None) -> None:
    """Raises NotImplementedError where D is no multiple of 64, ValueError for a norm without eps."""
    if x.shape[1] % WHOLE:
        raise NotImplementedError(f"limbs: rows of {x.shape[1]} are no multiple of {WHOLE}")
    if norm is not None and eps is None:
        raise ValueError("a norm needs its eps")
