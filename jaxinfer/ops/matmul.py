"""Products of activations with weights that may be packed."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxinfer.layers.norm import rms_norm
from jaxinfer.ops.form import form
from jaxinfer.pallas import matvec
from jaxinfer.pallas.limbs import limbs
from jaxinfer.quants import Packed, Weight, at, dense
from jaxinfer.tree import Index, pytree, static

LONG, RUN = 2**14, 256  # rows so long are summed in runs: 102 us in place of 200 for 5120 x 17408 of Q6_K, 79 for 132
MOST = 16  # rows of activations that the kernel for packed weights takes
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


def matmul_hopper(
    x: Float[Array, "B T D"], w: Weight, layer: Index | None = None, *, dtype: DTypeLike | None = None
) -> Float[Array, "B T F"]:
    """The reference's product; for few rows through the kernel for packed weights, else as `matmul_gpu`."""
    if x.shape[0] * x.shape[1] > MOST or not isinstance(w, Packed):
        return matmul_gpu(x, w, layer, dtype=dtype)
    if why := matvec.beyond(w):
        with form("decoded by XLA", why):
            return matmul_gpu(x, w, layer, dtype=dtype)
    w = w if layer is not None else jax.tree.map(lambda plane: plane[None], w)
    return _packed(x, [[w]], 0 if layer is None else layer, None, dtype=dtype or x.dtype)[0]


@pytree
class Norm:
    """The root-mean-square norm of a stack of layers."""

    weight: Float[Array, "R D"]
    eps: float = static()


def normed(x: Float[Array, "*n D"], norm: Norm | None, layer: Index) -> Float[Array, "*n D"]:
    return x if norm is None else rms_norm(x, norm.weight[layer], norm.eps)


def project_reference(
    x: Float[Array, "B T D"],
    weights: Sequence[Weight],
    layer: Index,
    *,
    matmul: Callable[..., Array],
    norm: Norm | None = None,
    combine: Callable[..., Array] | None = None,
    residual: Float[Array, "B T F"] | None = None,
) -> tuple[Float[Array, "B T _"], ...]:
    """Products of one x, normed before if there is a norm, with several weights.

    Where they are to be combined, there is one result, combine(*products). A residual is added to the only result.
    """
    y = normed(x, norm, layer)
    ys = tuple(matmul(y, w, layer) for w in weights)
    ys = ys if combine is None else (combine(*ys),)
    return ys if residual is None else tuple(residual + y for y in ys)


def project_hopper(
    x: Float[Array, "B T D"],
    weights: Sequence[Weight],
    layer: Index,
    *,
    norm: Norm | None = None,
    combine: Callable[..., Array] | None = None,
    residual: Float[Array, "B T F"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T _"], ...]:
    """The reference's products; for few rows and packed weights in one launch, after one for the norm."""
    if x.shape[0] * x.shape[1] > MOST or not any(isinstance(w, Packed) for w in weights):
        return project_reference(x, weights, layer, norm=norm, combine=combine, residual=residual, **options)
    if why := next((why for w in weights if (why := matvec.beyond(w))), None):
        with form("one by one", why):
            return project_reference(x, weights, layer, norm=norm, combine=combine, residual=residual, **options)
    sets = [[w] for w in weights] if combine is None else [list(weights)]
    return _packed(x, sets, layer, norm, dtype=x.dtype, combine=combine, residual=residual)


@form("packed codes and activations of 15 bits")
def _packed(
    x: Array, sets: Any, layer: Index, norm: Norm | None, *, residual: Array | None = None, **options: Any
) -> tuple[Array, ...]:
    """The kernels' products, with x as rows."""
    rows = x.reshape(-1, x.shape[-1])
    own = limbs(rows, norm and norm.weight, layer, norm and norm.eps)
    residual = None if residual is None else residual.reshape(len(rows), -1)
    ys = matvec.product(own, sets, layer, residual=residual, **options)
    return tuple(y.reshape(*x.shape[:-1], -1) for y in ys)
