"""An affine map whose weight may be packed."""

from jaxtyping import Array, Float

from jaxinfer.ops import Ops
from jaxinfer.quants import Weight
from jaxinfer.tree import Index, pytree


@pytree
class Linear:
    """A stack of affine maps over the repeats of a segment."""

    weight: Weight  # [R, F, D]
    bias: Array | None = None  # [R, F]


def linear(p: Linear, layer: Index | None, x: Float[Array, "B T D"], ops: Ops) -> Float[Array, "B T F"]:
    """x @ weight[layer].T + bias[layer], in x's type; None: the map is no stack."""
    y = ops.matmul(x, p.weight, layer)
    return y if p.bias is None else y + (p.bias if layer is None else p.bias[layer]).astype(y.dtype)
