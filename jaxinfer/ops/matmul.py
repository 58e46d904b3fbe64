"""Products of activations with weights that may be packed."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxinfer.layers.norm import rms_norm
from jaxinfer.ops.form import form
from jaxinfer.pallas import grouped, halves, matvec
from jaxinfer.pallas.limbs import narrowed
from jaxinfer.quants import Packed, Weight, at, dense
from jaxinfer.tree import Index, pytree, static

LONG, RUN = 2**14, 256  # rows so long are summed in runs: 102 us in place of 200 for 5120 x 17408 of Q6_K, 79 for 132
FEWEST, MOST = 8, 16  # rows of activations for which `matvec` is the best, and that it takes
MANY, LARGE = 2048, 10 * 2**20  # rows of x, and elements, from which on XLA's decoding costs less than cuBLAS gains
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
    x: Float[Array, "B T D"],
    w: Weight,
    layer: Index | None = None,
    *,
    dtype: DTypeLike | None = None,
    invariant: bool = False,
    narrow: bool = False,
) -> Float[Array, "B T F"]:
    """The reference's product, by the kernel for packed weights that `_kernel` finds, else as `matmul_gpu`.

    `invariant`: one kernel takes any number of rows, from 1 on, and each row has the same bits among any number of
    others. It takes what `grouped.beyond` does not name, plain weights too; the rest is marked as not invariant.
    `narrow`: activations are rounded to 8 bits where weights are packed, see `narrowed`.
    """
    kernel, why = _kernel(x, [w], invariant, narrow)
    if kernel is None:
        with nullcontext() if why is None else form("not invariant" if invariant else "decoded by XLA", why):
            return matmul_gpu(narrowed(x) if narrow and isinstance(w, Packed) else x, w, layer, dtype=dtype)
    w = w if layer is not None else jax.tree.map(lambda plane: plane[None], w)
    return kernel(x, [[w]], 0 if layer is None else layer, dtype=dtype or x.dtype)[0]


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
    invariant: bool = False,
    narrow: bool = False,
    **options: Any,
) -> tuple[Float[Array, "B T _"], ...]:
    """The reference's products, in one launch where a kernel takes all of the weights, see `matmul_hopper`.

    A row's bits are then those of its products alone, but for the norm and the residual, which XLA adds to many rows.
    """
    kernel, why = _kernel(x, weights, invariant, narrow)
    if kernel is None:
        with nullcontext() if why is None else form("one by one", why):
            return project_reference(x, weights, layer, norm=norm, combine=combine, residual=residual, **options)
    sets = [[w] for w in weights] if combine is None else [list(weights)]
    return kernel(x, sets, layer, norm, dtype=x.dtype, combine=combine, residual=residual)


type _Kernel = Callable[..., tuple[Array, ...]]


def _kernel(x: Array, weights: Sequence[Weight], invariant: bool, narrow: bool) -> tuple[_Kernel | None, str | None]:
    """What multiplies x with all of the weights, None for XLA, and why it is not the best for so many rows, if so.

    The kernel for few rows multiplies each of them by itself, or narrow ones by two, which is worth it up to FEWEST:
    the other one takes as long for 64 as for one, and decodes a weight once for 256 rows. XLA decodes it once, at what
    500 rows cost, and cuBLAS multiplies up to a fifth faster, which is worth it for more than MANY rows, or where x is
    LARGE.
    """
    rows, packed = x.shape[0] * x.shape[1], any(isinstance(w, Packed) for w in weights)
    if not (packed or invariant):
        fits = rows <= halves.MOST and not _beyond(_few, x, weights)
        return (partial(_few, why=None) if fits else None), None
    if (rows > MANY or x.size > LARGE) and not invariant:
        return None, f"more than {MANY} rows" if rows > MANY else f"more than {LARGE} activations"
    few = [_few] if rows <= MOST and not invariant else []
    first = None
    for kernel in [*few, _many] if rows <= FEWEST else [_many, *few]:
        if not (why := _beyond(kernel, x, weights)):
            return partial(kernel, why=first, narrow=narrow), first
        first = first or why
    return None, first


def _beyond(kernel: _Kernel, x: Array, weights: Sequence[Weight]) -> str | None:
    """Why a kernel does not multiply x with all of the weights, None where it does."""
    if kernel is _few and not any(isinstance(w, Packed) for w in weights):
        return f"activations of {x.dtype}" if x.dtype not in halves.KINDS else halves.beyond(weights)
    if kernel is _few:
        return next((why for w in weights if (why := matvec.beyond(w))), None)
    wrong = [w.dtype for w in weights if not isinstance(w, Packed) and w.dtype != x.dtype]
    if x.dtype not in (jnp.bfloat16, jnp.float16) or wrong:
        return f"activations of {x.dtype}{f' and weights of {wrong[0]}' if wrong else ''}"
    return grouped.beyond(weights)


def _few(
    x: Array,
    sets: Any,
    layer: Index,
    norm: Norm | None = None,
    *,
    why: str | None,
    narrow: bool = False,
    residual: Array | None = None,
    **options: Any,
) -> tuple[Array, ...]:
    """Products of `pallas.matvec`, or of `pallas.halves` for plain weights, with x as rows, normed within."""
    packed = isinstance(sets[0][0], Packed)
    product = partial(matvec.product, narrow=narrow) if packed else halves.product
    codes = f"packed codes and activations of {8 if narrow else 15} bits"
    with form(codes if packed else "weights of 16 bits, in place", why):
        rows = x.reshape(-1, x.shape[-1])
        before = {"norm": norm.weight, "eps": norm.eps} if norm else {}
        residual = None if residual is None else residual.reshape(len(rows), -1)
        ys = product(rows, sets, layer, residual=residual, **before, **options)
        return tuple(y.reshape(*x.shape[:-1], -1) for y in ys)


def _many(
    x: Array,
    sets: Any,
    layer: Index,
    norm: Norm | None = None,
    *,
    why: str | None,
    narrow: bool = False,
    residual: Array | None = None,
    **options: Any,
) -> tuple[Array, ...]:
    """Products of `pallas.grouped`, with x as rows."""
    with form("weights as the tensor cores' left operand", why):
        rows = normed(x, norm, layer).reshape(-1, x.shape[-1])
        rows = narrowed(rows) if narrow and isinstance(sets[0][0], Packed) else rows
        ys = [y.reshape(*x.shape[:-1], -1) for y in grouped.ungrouped(rows, sets, layer, **options)]
        return tuple(ys if residual is None else [residual + y for y in ys])
