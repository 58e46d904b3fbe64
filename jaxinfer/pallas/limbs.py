"""Activations as integers of two signed 8-bit limbs, a scale for each run of 32, for products on int8 tensor cores.

A warpgroup makes a few runs. Where there is a norm, it adds up the squares of the whole row for itself, in an order
that is given by the row's length, which takes less time than another launch.
"""

import math
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
ROUND = 1.5 * 2**23  # added to an f32 it leaves the nearest integer, to even, in the last bits
WHOLE, MOST, THREADS = 64, 512, 128  # what divides a row; elements of a CTA, at most; its threads


@pytree
class Limbs:
    """y = scale * (256 high + low) for M tokens of D = 32 r = 16 n elements.

    A run whose largest magnitude is a has the scale 2^max(floor(log2 a) - 13, -100): integers are rounded half to even
    and reach 2^14, and bf16 is exact down to 2^-6 a. What is subnormal is 0, on devices that flush it and others. A run
    with an infinity or a nan has the scale nan, and nan as its sums; its codes mean nothing.
    """

    codes: Int[Array, "M n 2 4"]  # int32, little-endian: of each 16 elements the high limbs, then the low ones
    scale: Float[Array, "M r"]  # f32
    sums: Float[Array, "M n"]  # f32: scale times the sum of 16 integers, which is exact where it is finite


def limbs_reference(x: Float[Array, "M D"], norm: Float[Array, "R D"] | None, layer: Index, eps: float | None) -> Limbs:
    """Limbs of rms_norm(x, norm[layer], eps), rounded to x's dtype, or of x where eps is None."""
    m, width = x.shape
    y = x if eps is None else rms_norm(x, None if norm is None else norm[layer], eps)
    y = y.astype(jnp.float32).reshape(m, -1, RUN)
    scale, inverse = _scale(_bits(jnp.abs(y)).max(axis=2))  # of floats XLA's CPU code may drop a nan
    n = jnp.round(y * inverse[..., None]).astype(jnp.int32)
    low = ((n + 128) & 255) - 128
    both = jnp.stack([(n - low) >> 8, low], axis=2).reshape(m, -1, 2, 2, PART).swapaxes(2, 3)
    codes = lax.bitcast_convert_type(both.astype(jnp.int8).reshape(m, width // PART, 2, 4, 4), jnp.int32)
    sums = n.reshape(m, -1, 2, PART).sum(axis=3).astype(jnp.float32) * scale[..., None]
    return Limbs(codes, scale, sums.reshape(m, -1))


def _bits(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    return lax.bitcast_convert_type(x, jnp.int32)


def _scale(largest: Int[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """A run's scale, and its inverse, from the bits of its largest magnitude: powers of 2, made of bits."""
    exponent = largest >> 23
    field = jnp.maximum(exponent - BITS, 127 + LEAST)
    scale, inverse = (lax.bitcast_convert_type(e << 23, jnp.float32) for e in (field, 254 - field))
    return jnp.where(exponent == 255, jnp.nan, scale), inverse


@partial(jax.jit, static_argnames=("eps", "interpret"))
def limbs(
    x: Float[Array, "M D"],
    norm: Float[Array, "R D"] | None,
    layer: Index,
    eps: float | None,
    *,
    interpret: bool = False,
) -> Limbs:
    """`limbs_reference` in one launch for sm_80, 89 and 90; a row's bits do not depend on the others.

    Raises NotImplementedError where D is no multiple of 64, ValueError for a norm without eps.
    """
    m, width = x.shape
    if width % WHOLE:
        raise NotImplementedError(f"limbs: rows of {width} are no multiple of {WHOLE}")
    if norm is not None and eps is None:
        raise ValueError("a norm needs its eps")
    own = math.gcd(width, MOST)
    runs, vector = own // RUN, max(own // THREADS, 1)
    shape = (runs, 2, 4, 4)  # of a CTA's elements: run, half of it, word, byte
    warps = (-8,) if runs > 2 else (-8, Replicated(2))  # two warps make the same where there are only two runs
    layout = registers.layout([shape, (max(runs // 4, 1), 2, 4, vector)], warps, (-4, -3, -2, -5))
    strided = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(width // THREADS, 16 // x.dtype.itemsize))
    if width % THREADS:  # each warp has the whole row
        strided = registers.layout([(own,), (own // 32,)], (Replicated(4),), (-2,))

    def make_limbs(layer_gmem, x_gmem, row_gmem, norm_gmem, codes_gmem, scale_gmem, sums_gmem):
        token = lax.axis_index("token")
        mine = pl.ds(lax.axis_index("part") * runs, runs)

        def load(ref: Any) -> Array:
            return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

        def across(run: Array, dims: int) -> Array:
            """A run's number for each of its elements, or parts."""
            out = lax.broadcast_in_dim(run, shape[:dims], [0])
            return plgpu.layout_cast(out, layout.reduce(tuple(range(dims, 4))))

        layer = layer_gmem[0]
        y = load(x_gmem.at[token, mine])
        if eps is not None:
            row = plgpu.load(row_gmem.at[token], layout=strided, optimized=False)
            weight = None if norm_gmem is None else load(norm_gmem.at[layer, mine])  # last, as it waits for the layer
            row = row.astype(jnp.float32)
            y = y * lax.rsqrt((row * row).sum() * (1 / width) + eps)
            y = (y if weight is None else y * weight).astype(x.dtype).astype(jnp.float32)
        scale, inverse = _scale(_bits(jnp.abs(y).max(axis=3).max(axis=2).max(axis=1)))
        bits = _bits(y * across(inverse, 4) + ROUND)
        shift = plgpu.broadcasted_iota(jnp.int32, shape, 3, layout=layout) << 3
        for limb, limb_bits in enumerate(((bits + 128) >> 8, bits)):
            codes_gmem[token, mine, :, limb] = ((limb_bits & 255) << shift).sum(axis=3)
        n = bits - _bits(jnp.float32(ROUND))
        scale_gmem[token, mine] = scale
        sums_gmem[token, mine] = n.sum(axis=3).sum(axis=2).astype(jnp.float32) * across(scale, 2)

    def view(a: Array | None) -> Array | None:
        return None if a is None else a.reshape(len(a), -1, *shape[1:])

    r = width // RUN
    codes, scale, sums = plgpu.kernel(
        make_limbs,
        out_type=[
            jax.ShapeDtypeStruct((m, r, 2, 2, 4), jnp.int32),
            jax.ShapeDtypeStruct((m, r), jnp.float32),
            jax.ShapeDtypeStruct((m, r, 2), jnp.float32),
        ],
        grid=(m, width // own),
        grid_names=("token", "part"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(jnp.asarray(layer, jnp.int32).reshape(1), view(x), x, view(norm))
    return Limbs(codes.reshape(m, 2 * r, 2, 4), scale, sums.reshape(m, 2 * r))
