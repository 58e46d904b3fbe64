"""The weighted sum of each token's rows, wherever they lie, with what is added to it, in one launch for all tokens.

A thread makes 8 neighbouring elements of a token: it loads them of all rows at once, then adds in the order of choice.
Nobody else writes them, so that no bit depends on how rows were grouped, nor on other tokens.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.pallas.registers import gather, inline, layout, store

UNIT, VECTOR = 64, 8  # what divides a row; elements of a thread
WARPS, LANES = 4, 32  # of a CTA, of a warp


def reduce_reference(
    rows: Float[Array, "N D"],
    place: Int[Array, "M A"] | None,
    weights: Float[Array, "M A"],
    valid: Bool[Array, " M"] | None,
    *,
    shared: Float[Array, "M D"] | None = None,
    gate: Float[Array, " M"] | None = None,
    residual: Float[Array, "M D"] | None = None,
    dtype: DTypeLike,
) -> Float[Array, "M D"]:
    """The sum over a of weights[m, a] * rows[place[m, a]], in the order of a, or 0 where m is not valid.

    Without places rows are in the order of choices, without `valid` all are. Then shared[m], times sigmoid(gate[m])
    where there is one, and residual[m] are added. All in f32, products and sums rounded one by one, from zero on; the
    result is rounded to `dtype`.
    """

    def product(w: Array, y: Array) -> Array:
        return lax.optimization_barrier(w[:, None] * y.astype(jnp.float32))  # XLA would contract it with a sum

    if place is None:
        place = jnp.arange(weights.size, dtype=jnp.int32).reshape(weights.shape)
    # `sum` is a fold from 0 on; the order of jnp's is not defined.
    y = sum((product(w, rows[to]) for w, to in zip(weights.T, place.T, strict=True)), jnp.float32(0))
    if valid is not None:
        y = jnp.where(valid[:, None], y, 0)
    if shared is not None:
        y += shared.astype(jnp.float32) if gate is None else product(jax.nn.sigmoid(gate), shared)
    if residual is not None:
        y += residual.astype(jnp.float32)
    return y.astype(dtype)


@partial(jax.jit, static_argnames=("dtype", "interpret"))
def reduce(
    rows: Float[Array, "N D"],
    place: Int[Array, "M A"] | None,
    weights: Float[Array, "M A"],
    valid: Bool[Array, " M"] | None,
    *,
    shared: Float[Array, "M D"] | None = None,
    gate: Float[Array, " M"] | None = None,
    residual: Float[Array, "M D"] | None = None,
    dtype: DTypeLike,
    interpret: bool = False,
) -> Float[Array, "M D"]:
    """`reduce_reference`, bit for bit but for the gate, whose exp may differ by a unit. Places are rows that exist.

    Raises NotImplementedError where D is no multiple of 64, or where rows are 2^31 elements and more.
    """
    (n, width), (m, used) = rows.shape, weights.shape
    if width % UNIT or n * width >= 2**31:
        raise NotImplementedError(f"reduce: {n} rows of {width} are not by {UNIT}, or 2^31 elements and more")
    if gate is not None and shared is None:
        raise ValueError("a gate is of a shared expert, and there is none")
    vectors = width // VECTOR
    threads = math.gcd(m * vectors, WARPS * LANES)  # that have something of their own
    shape = threads, VECTOR
    lanes = min(threads, LANES)
    warps, spare = threads // lanes, LANES // lanes
    VECTORS = layout(
        [(threads, VECTOR), (lanes, VECTOR)],
        [-4] * (warps > 1) + [plgpu.Replicated(WARPS // warps)] * (warps < WARPS),
        [-2] + [plgpu.Replicated(spare)] * (spare > 1),
    )
    NUMBERS = VECTORS.reduce((1,))

    def scatter_reduce(
        rows_gmem, place_gmem, weights_gmem, valid_gmem, shared_gmem, gate_gmem, residual_gmem, out_gmem
    ):
        first = lax.axis_index("tile") * threads
        mine = pl.ds(first, threads)
        index = first + plgpu.broadcasted_iota(jnp.int32, (threads,), 0, layout=NUMBERS)
        token, vector = lax.div(index, vectors), lax.rem(index, vectors)
        element = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=VECTORS)

        def across(x: Array) -> Array:
            return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [0]), VECTORS)

        def own(ref: Any) -> Array:
            return plgpu.load(ref.at[mine], layout=VECTORS, optimized=False)

        def of_token(ref: Any, i: Array = token) -> Array:
            return gather(ref, i, NUMBERS, interpret=interpret)

        def product(w: Array, y: Array) -> Array:
            return _product(across(w), y.astype(jnp.float32), VECTORS, interpret=interpret)

        choices = [token * used + a for a in range(used)]
        places = choices if place_gmem is None else [of_token(place_gmem, choice) for choice in choices]
        # All is asked for before anything is waited for.
        factors = [of_token(weights_gmem, choice) for choice in choices]
        valid, gate = (None if ref is None else of_token(ref) for ref in (valid_gmem, gate_gmem))
        shared, residual = (None if ref is None else own(ref) for ref in (shared_gmem, residual_gmem))
        ys = [
            gather(rows_gmem, across(to * width + vector * VECTOR) + element, VECTORS, interpret=interpret)
            for to in places
        ]
        y: Any = sum(map(product, factors, ys))
        if valid is not None:
            y = jnp.where(across(valid) > 0, y, 0.0)
        if shared is not None:
            y += shared.astype(jnp.float32) if gate is None else product(jax.nn.sigmoid(gate), shared)
        if residual is not None:
            y += residual.astype(jnp.float32)
        store(out_gmem.at[mine], y.astype(dtype))

    def view(x: Array | None) -> Array | None:
        return None if x is None else x.reshape(-1, VECTOR)

    return plgpu.kernel(
        scatter_reduce,
        out_type=jax.ShapeDtypeStruct((m * vectors, VECTOR), dtype),
        grid=(m * vectors // threads,),
        grid_names=("tile",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else False,
    )(
        rows.reshape(-1),
        None if place is None else place.reshape(-1),
        weights.reshape(-1),
        None if valid is None else valid.astype(jnp.int32),
        view(shared),
        gate,
        view(residual),
    ).reshape(m, width)


def _product(x: Array, y: Array, layout: Any, *, interpret: bool) -> Array:
    """x * y, rounded. PTX names the rounding, or its assembler contracts a product with the sum that takes it."""
    if interpret:
        return lax.optimization_barrier(x * y)

    @inline(arg_types=(layout, layout), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout))
    def multiply(ctx: Any, x: fa.FragmentedArray, y: fa.FragmentedArray) -> fa.FragmentedArray:
        return x._pointwise(x._lift_fast_instr("mul.rn.f32"), y)

    return multiply(x, y)
