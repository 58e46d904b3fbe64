"""An affine map whose weight may be packed, and several of one x."""

from collections.abc import Callable, Sequence

from jaxtyping import Array, Float

from jaxinfer.ops import Ops
from jaxinfer.ops.matmul import Norm
from jaxinfer.quants import Weight
from jaxinfer.tree import Index, pytree


@pytree
class Linear:
    """The affine maps of a stack of layers."""

    weight: Weight  # [R, F, D]
    bias: Array | None = None  # [R, F]


def linear(
    p: Linear, layer: Index | None, x: Float[Array, "B T D"], ops: Ops, residual: Float[Array, "B T F"] | None = None
) -> Float[Array, "B T F"]:
    """x @ weight[layer].T + bias[layer], plus a residual, in x's type; a layer of None: the map is no stack."""
    if residual is not None and layer is not None and p.bias is None:
        return ops.project(x, (p.weight,), layer, matmul=ops.matmul, residual=residual)[0]
    y = ops.matmul(x, p.weight, layer)
    y = y if p.bias is None else y + (p.bias if layer is None else p.bias[layer]).astype(y.dtype)
    return y if residual is None else residual + y


def linears(
    maps: Sequence[Linear],
    layer: Index,
    x: Float[Array, "B T D"],
    ops: Ops,
    *,
    norm: Norm | None = None,
    combine: Callable[..., Array] | None = None,
) -> tuple[Float[Array, "B T _"], ...]:
    """Several maps of one x, which is normed before if there is a norm; combined to one result if they are to be."""
    biased = any(p.bias is not None for p in maps)
    fused = None if biased else combine
    ys = ops.project(x, tuple(p.weight for p in maps), layer, matmul=ops.matmul, norm=norm, combine=fused)
    if biased:
        ys = [y if p.bias is None else y + p.bias[layer].astype(y.dtype) for p, y in zip(maps, ys, strict=True)]
        ys = ys if combine is None else [combine(*ys)]
    return tuple(ys)
