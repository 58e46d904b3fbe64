"""A router's scores of a few tokens, and which experts a token passes through and with what weights, from scores.

A launch each. In the first a warp has an expert and a token, in the second a token, so that its sums and maxima are its
own. Scores are compared as integers of the same order, for which a warp has an instruction.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.layers.routing import ROUTINGS, Routing, sigmoid_of_chosen, softmax_of_all
from jaxinfer.pallas import registers
from jaxinfer.tree import Index

MOST, MOST_USED = 512, 16  # experts, and those of a token
WARPS, LANES = 4, 32  # of a CTA, of a warp
PART = 128  # columns of a router that a warp takes at a time, 16 bytes a lane
LEAST = -(2**31)  # what is chosen already, or no expert


def beyond(experts: int, used: int, routing: Routing) -> str | None:
    """Why the kernel does not choose so, None where it does."""
    if routing not in ROUTINGS:
        return f"{routing.__name__} is not among its recipes"
    if experts > MOST or used > MOST_USED:
        return f"{used} of {experts} experts are more than {MOST_USED} of {MOST}"
    return None


def beyond_score(x: Float[Array, "M D"], weight: Any) -> str | None:
    """Why the kernel does not score rows, None where it does."""
    if weight.dtype != jnp.float32:
        return f"a router in {weight.dtype}"
    experts, width = weight.shape[-2:]
    if experts % WARPS or width % PART or x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{experts} x {width} for rows in {x.dtype}: experts by {WARPS}, columns by {PART}, rows of 16 bits"
    return None


@partial(jax.jit, static_argnames=("eps", "interpret"))
def score(
    x: Float[Array, "M D"],
    weight: Float[Array, "R E D"],
    layer: Index,
    norm: Float[Array, "R D"] | None = None,
    eps: float | None = None,
    gate: Float[Array, "R D"] | None = None,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "M E"], Float[Array, " M"] | None]:
    """weight[layer] x and gate[layer] x in f32, for x normed before, and rounded to its type, where there is an eps.

    Sums are of a fixed order: a row's bits do not depend on the others. Raises NotImplementedError for what is
    `beyond_score`.
    """
    (m, width), experts = x.shape, weight.shape[1]
    if why := beyond_score(x, weight):
        raise NotImplementedError(f"score: {why}")
    parts = [pl.ds(i, PART) for i in range(0, width, PART)]
    EACH = registers.layout([(WARPS, PART), (1, LANES * 4), (4,)], (-5,), (-2,))  # [expert, column]
    ROW = EACH.reduce((0,))

    fours = experts // WARPS

    def score_experts(layer_gmem, x_gmem, norm_gmem, weight_gmem, gate_gmem, out_gmem, gate_out_gmem):
        token, index, layer = lax.axis_index("token"), lax.axis_index("four"), layer_gmem[0]

        def load(ref: Any, layout: Any) -> Array:
            return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

        ys = [load(x_gmem.at[token, part], ROW) for part in parts]
        if eps is not None:
            rms = lax.rsqrt(sum((y * y).sum() for y in ys) * (1 / width) + eps)
            for i, part in enumerate(parts):
                y = ys[i] * rms if norm_gmem is None else ys[i] * rms * load(norm_gmem.at[layer, part], ROW)
                ys[i] = y.astype(x.dtype).astype(jnp.float32)

        @pl.when(index < fours)
        def _() -> None:
            four = pl.ds(index * WARPS, WARPS)
            total = plgpu.layout_cast(jnp.zeros((WARPS, PART), jnp.float32), EACH)
            for y, part in zip(ys, parts, strict=True):
                row = plgpu.layout_cast(lax.broadcast_in_dim(y, (WARPS, PART), [1]), EACH)
                total = total + row * load(weight_gmem.at[layer, four, part], EACH)
            registers.store(out_gmem.at[token, four], total.sum(axis=1))

        if gate is not None:  # all warps have it

            @pl.when(index == fours)
            def _() -> None:
                terms = [y * load(gate_gmem.at[layer, part], ROW) for y, part in zip(ys, parts, strict=True)]
                registers.store(gate_out_gmem.at[token], sum(terms[1:], terms[0]).sum())

    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return plgpu.kernel(
        score_experts,
        out_type=(shape((m, experts)), None if gate is None else shape((m,))),
        grid=(m, fours + (gate is not None)),
        grid_names=("token", "four"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(jnp.asarray(layer, jnp.int32).reshape(1), x, norm, weight, gate)


@partial(jax.jit, static_argnames=("used", "routing", "interpret"))
def route(
    scores: Float[Array, "M E"], used: int, routing: Routing, *, interpret: bool = False
) -> tuple[Int[Array, "M A"], Float[Array, "M A"]]:
    """The recipe's choice, exactly, from f32 scores, and its weights in f32, which err by a few units as exp does.

    The order is that of `lax.top_k`: -nan < -inf < -0 < 0 < inf < nan. A nan that is chosen makes all weights of a
    softmax nan. Raises NotImplementedError for what is `beyond` it.
    """
    m, experts = scores.shape
    if why := beyond(experts, used, routing):
        raise NotImplementedError(f"route: {why}")
    if scores.dtype != jnp.float32 or used > experts:
        raise ValueError(f"{used} of {experts} scores in {scores.dtype}: they are f32, and as many at least")
    rows = math.gcd(m, WARPS)
    width = -(-experts // LANES) * LANES
    vector = math.gcd(width // LANES, 4)  # 16 bytes at most
    slots = 1 << max(used - 1, 1).bit_length()  # of a row: a lane writes each

    def shape(columns: int) -> tuple[int, ...]:
        return (rows, columns) if rows > 1 else (columns,)  # numbers of a row that is alone are scalars

    # A warp has a row; where there are fewer rows, several have the same. Lanes are LANES / slots by slots both times,
    # so that numbers of rows are in either.
    spare = [plgpu.Replicated(WARPS // rows)] * (rows < WARPS)
    SCORES = registers.layout(
        [shape(LANES * vector), (slots * vector,), (vector,)], [-4] * (rows > 1) + spare, (-3, -2)
    )
    SLOTS = registers.layout([shape(slots), (1,)], [-3] * (rows > 1) + spare, (plgpu.Replicated(LANES // slots), -2))

    def numbered(columns: int, layout: Any) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, shape(columns), len(shape(columns)) - 1, layout=layout)

    def across(x: Array, columns: int, layout: Any) -> Array:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape(columns), range(x.ndim)), layout)

    def choose_experts(scores_gmem, chosen_gmem, weights_gmem):
        tile = lax.axis_index("tile")
        mine = pl.ds(tile * rows, rows) if rows > 1 else tile
        column, slot = numbered(width, SCORES), numbered(slots, SLOTS)
        s = plgpu.load(scores_gmem.at[mine], layout=SCORES, optimized=False)
        left = _turned(lax.bitcast_convert_type(s, jnp.int32))
        if width > experts:
            left = jnp.where(column < experts, left, LEAST)
        top, chosen, best = left.max(axis=-1), slot, slot
        for a in range(used):
            most = left.max(axis=-1) if a else top
            # The lowest index is found as a maximum, for warps have no instruction for the minimum.
            index = width - jnp.where(left == across(most, width, SCORES), width - column, 0).max(axis=-1)
            left = jnp.where(column != across(index, width, SCORES), left, LEAST)  # LEAST first would make it unsigned
            chosen = jnp.where(slot < a, chosen, across(index, slots, SLOTS))
            best = jnp.where(slot < a, best, across(most, slots, SLOTS))
        best = lax.bitcast_convert_type(_turned(best), jnp.float32)
        if routing is sigmoid_of_chosen:
            weights = jax.nn.sigmoid(best)
        else:
            top = lax.bitcast_convert_type(_turned(top), jnp.float32)
            weights = jnp.exp(best - across(top, slots, SLOTS))
            # Renormalised are those of the chosen alone: the best of 512 has a 512th, so that no sum is clamped.
            if routing is softmax_of_all:
                each, real = jnp.exp(s - across(top, width, SCORES)), column < experts
            else:
                each, real = weights, slot < used
            weights = weights / across(jnp.where(real, each, 0.0).sum(axis=-1), slots, SLOTS)
        registers.store(chosen_gmem.at[mine], chosen)
        registers.store(weights_gmem.at[mine], weights)

    chosen, weights = plgpu.kernel(
        choose_experts,
        out_type=tuple(jax.ShapeDtypeStruct((m, slots), dtype) for dtype in (jnp.int32, jnp.float32)),
        grid=(m // rows,),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(jnp.pad(scores, ((0, 0), (0, width - experts))))
    return chosen[:, :used], weights[:, :used]


def _turned(x: Array) -> Array:
    """From the bits of an f32 to an integer of the same order, and back."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)
