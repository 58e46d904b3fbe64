"""Products of activations with weights that may be packed."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxinfer.ops.form import form
from jaxinfer.quants import Weight, at, dense
from jaxinfer.tree import Index

LONG, RUN = 2**14, 256  # rows so long are summed in runs: 102 us in place of 200 for 5120 x 17408 of Q6_K, 79 for 132
FEW = 8  # rows of activations up to which a product is bound by its weight's bytes alone


@form("product")
def matmul_reference(
    x: Float[Array, "B T D"], w: Weight, layer: Index | None = None, *, dtype: DTypeLike | None = None
) -> Float[Array, "B T F"]:
    """x @ w[layer].T for a weight [R, F, D], or [F, D] where `layer` is None.

    Operands in x's type, sums in f32, the result in `dtype` (x's by default). An f32 product is one, not TF32.
    """
    w = dense(w if layer is None else at(w, layer), x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("btd,fd->btf", x, w, precision=precision, preferred_element_type=dtype or x.dtype)


def matmul_gpu(
    x: Float[Array, "B T D"], w: Weight, layer: Index | None = None, *, dtype: DTypeLike | None = None
) -> Float[Array, "B T F"]:
    """The reference's product; for few rows multiplied and summed.

    Slice, decoding and product are then one fusion that reads the stack in place, at up to 4.3 TB/s on an H200, where a
    library product first copies the layer's weight out of the stack (75 tokens/s against 180 for an 8B model). The
    barrier keeps XLA from making one sum of the two.
    """
    if x.shape[0] * x.shape[1] > FEW:
        return matmul_reference(x, w, layer, dtype=dtype)
    with form("multiply and sum, in place"):
        w = dense(w if layer is None else at(w, layer), jnp.float32)
        y = x[:, :, None, :].astype(jnp.float32) * w
        if w.shape[-1] >= LONG and w.shape[-1] % RUN == 0:
            y = lax.optimization_barrier(y.reshape(*y.shape[:-1], -1, RUN).sum(-1))
        return y.sum(-1).astype(dtype or x.dtype)
