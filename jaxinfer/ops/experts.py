"""Routed experts: each row of activations passes through the few networks that were chosen for it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.ops.form import form
from jaxinfer.ops.matmul import FEW, MOST, Norm, matmul_reference, normed
from jaxinfer.pallas import grouped, halves, matvec
from jaxinfer.pallas.limbs import narrowed
from jaxinfer.pallas.reduce import UNIT, reduce, reduce_reference
from jaxinfer.quants import Packed, Weight, at, dense
from jaxinfer.tree import Index, pytree

type Activation = Callable[[Array, Array], Array]  # (gate, up) -> hidden
type Product = Callable[[Array, Weight], Array]  # rows [n, D], a weight [F, D] -> f32 [n, F]


@pytree
class ExpertParams:
    """Gated feed-forward networks of width F, E of them for each layer of a stack."""

    gate: Weight  # [R, E, F, D], or [R, E, 2F, D] where `up` is None: the gate's rows, then those of up
    up: Weight | None  # [R, E, F, D]
    down: Weight  # [R, E, D, F]
    gate_bias: Array | None = None  # [R, E, F], or [R, E, 2F]
    up_bias: Array | None = None  # [R, E, F]
    down_bias: Array | None = None  # [R, E, D]
    scale: Array | None = None  # [R, E], of an expert's output with its bias


class Tiles(NamedTuple):
    """Assignments laid out by expert, in their own order, each expert's in a run of whole tiles of rows.

    What is static are n tiles, ceil(M A / tile) + min(E, M A): each expert that is chosen fills one in part at most.
    """

    place: Int[Array, "M A"]  # the row of an assignment; 0 for those of padding
    source: Int[Array, " rows"]  # the token whose activations a row takes; 0 for rows that are nobody's
    starts: Int[Array, " E+1"]  # where each expert's tiles begin, and where the last one's end


class Groups(NamedTuple):
    """Assignments of rows to experts, m * A + a for the a-th choice of row m, brought together by expert."""

    order: Int[Array, " n"]  # assignments by expert, each expert's in their own order; those of padding last
    starts: Int[Array, " E+1"]  # where each expert's begin in it, and where padding does
    active: Int[Array, " E"]  # experts with assignments, ascending, before those without
    n_active: Int[Array, ""]


def experts_reference(
    p: ExpertParams,
    layer: Index,
    x: Float[Array, "M D"],
    chosen: Int[Array, "M A"],
    weights: Float[Array, "M A"],
    valid: Bool[Array, " M"],
    *,
    activation: Activation,
    norm: Norm | None = None,
    dtype: DTypeLike,
    **added: Array,
) -> Float[Array, "M D"]:
    """The sum over a of weights[m, a] * expert[chosen[m, a]](x[m]), in the order of a; zeros where not valid.

    x is normed before if there is a norm. An expert is scale * (down @ activation(gate @ x + bias, up @ x + bias) +
    bias): operands in x's type, the rest in f32. Many rows are grouped by expert, see `_grouped` for what that takes;
    few pass one choice after the other. The `dtype` of the result and what is `added` to the sum are
    `reduce_reference`'s.
    """
    x = normed(x, norm, layer)
    if len(x) > FEW:
        with form("grouped by expert"):
            rows, place = _grouped(p, layer, x, chosen, valid, activation)
    else:
        with form("choice by choice"):
            rows, place = _each(p, layer, x, chosen, lambda one: partial(lax.map, one), _product, activation)
    return reduce_reference(rows, place, weights, valid, dtype=dtype, **added)


def experts_gpu(
    p: ExpertParams,
    layer: Index,
    x: Float[Array, "M D"],
    chosen: Int[Array, "M A"],
    weights: Float[Array, "M A"],
    valid: Bool[Array, " M"],
    *,
    activation: Activation,
    norm: Norm | None = None,
    **options: Any,
) -> Float[Array, "M D"]:
    """The reference's sum; few rows are multiplied and summed as in `matmul_gpu`, all of their choices at once.

    Picking the experts, decoding and product are then one fusion, which reads the chosen ones where they lie.
    """
    if len(x) > FEW:
        return experts_reference(p, layer, x, chosen, weights, valid, activation=activation, norm=norm, **options)

    def product(x: Array, w: Weight) -> Array:
        return (x[:, None].astype(jnp.float32) * dense(w)).sum(-1)

    with form("all choices at once, in place"):
        rows, place = _each(p, layer, normed(x, norm, layer), chosen, jax.vmap, product, activation)
    return reduce_reference(rows, place, weights, valid, **options)


def experts_hopper(
    p: ExpertParams,
    layer: Index,
    x: Float[Array, "M D"],
    chosen: Int[Array, "M A"],
    weights: Float[Array, "M A"],
    valid: Bool[Array, " M"],
    *,
    activation: Activation,
    norm: Norm | None = None,
    invariant: bool = False,
    narrow: bool = False,
    **options: Any,
) -> Float[Array, "M D"]:
    """The reference's sum, by kernels.

    Many rows are laid out by expert for two grouped products; few read their own choices' weights, a choice at a time.
    One launch adds up the choices. An expert's scale is multiplied with the choice's weight. `invariant`: few rows are
    laid out, too, and a row has the same bits among any number of others, see `matmul_hopper`. `narrow`: what is
    multiplied with packed weights, hidden values too, is rounded to 8 bits.
    """
    few = len(x) <= MOST and not invariant
    if why := beyond(p, few, x.dtype):
        with form("by XLA", f"{why}, and activations as they are" if narrow else why):
            return experts_gpu(p, layer, x, chosen, weights, valid, activation=activation, norm=norm, **options)
    if p.scale is not None:
        weights = weights * p.scale[layer, chosen].astype(jnp.float32)
    bits = " of 8 bits" if narrow else ""
    if not few:
        with form(f"grouped products{bits}"):
            rows, place = _laid_out(p, layer, x, norm, chosen, valid, activation, narrow)
            return reduce(rows, place, weights, valid, **options)
    with form(f"few rows{bits}, choice by choice"):
        # A single row is padding only where all is done: then its experts are read in vain, else launches are saved.
        if len(x) > 1:
            chosen = jnp.where(valid[:, None], chosen, p.down.shape[1])
        rows = _chosen(p, layer, x, norm, chosen, activation, narrow)
        return reduce(rows, None, weights, valid if len(x) > 1 else None, **options)


def beyond(p: ExpertParams, few: bool, dtype: np.dtype) -> str | None:
    """Why there are no kernels for experts and activations of a type, None where there are."""
    ups = [p.gate] if p.up is None else [p.gate, p.up]
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations of {dtype}"
    if p.up is not None and (p.gate_bias is None) != (p.up_bias is None):
        return "one of gate and up has a bias, the other has none"
    if p.down.shape[-2] % UNIT:
        return f"{p.down.shape[-2]} columns are no multiple of {UNIT}"
    if few:
        return _beyond_few(ups, 3 - len(ups)) or _beyond_few([p.down])
    return grouped.beyond(ups, 3 - len(ups)) or grouped.beyond([p.down])


def _beyond_few(ws: list[Weight], parts: int = 1) -> str | None:
    if not isinstance(ws[0], Packed):
        return halves.beyond(ws, parts)
    return next((why for w in ws if (why := matvec.beyond(w, parts))), None)


def _chosen(
    p: ExpertParams, layer: Index, x: Array, norm: Norm | None, chosen: Array, activation: Activation, narrow: bool
) -> Float[Array, "n D"]:
    """The f32 outputs of few rows' choices, choice by choice; zeros where there is no such expert."""
    (ups, up_biases), (downs, down_biases) = _sides(p)

    def product(x: Array, ws: list[Weight], **options: Any) -> Array:
        kernel = partial(matvec.product, narrow=narrow) if isinstance(ws[0], Packed) else halves.product
        return kernel(x, [ws], layer, experts=chosen.reshape(-1), **options)[0]

    before = {"norm": norm.weight, "eps": norm.eps} if norm else {}
    h = product(x, ups, biases=up_biases and [up_biases], combine=activation, dtype=x.dtype, **before)
    return product(h, downs, biases=down_biases and [down_biases], dtype=jnp.float32)


def _laid_out(
    p: ExpertParams,
    layer: Index,
    x: Array,
    norm: Norm | None,
    chosen: Array,
    valid: Array,
    activation: Activation,
    narrow: bool,
) -> tuple[Float[Array, "n D"], Int[Array, "M A"]]:
    """The outputs of many rows' choices, in x's type, laid out by expert in whole tiles; and which one is whose."""
    tile, experts = layout_tile(chosen.size, p.down.shape[1]), p.down.shape[1]
    to = tiles(chosen, valid, experts, tile)
    (ups, up_biases), (downs, down_biases) = _sides(p)
    product = partial(grouped.grouped, layer=layer, starts=to.starts, tile=tile, dtype=x.dtype)
    x = normed(x, norm, layer)
    if isinstance(p.gate, Packed):
        x = grouped.permuted(narrowed(x) if narrow else x)
    packed = isinstance(p.down, Packed)
    h = product(x[to.source], ups, biases=up_biases, combine=activation, permute=packed)
    return product(narrowed(h) if narrow and packed else h, downs, biases=down_biases), to.place


def _sides(p: ExpertParams) -> list[tuple[list[Weight], list[Array] | None]]:
    """The weights of gate and up, which may be one, and of down, each with their biases."""
    ups = [(p.gate, p.gate_bias)] if p.up is None else [(p.gate, p.gate_bias), (p.up, p.up_bias)]
    sides = [list(zip(*side, strict=True)) for side in (ups, [(p.down, p.down_bias)])]
    return [(list(ws), None if any(b is None for b in biases) else list(biases)) for ws, biases in sides]


def layout_tile(assignments: int, experts: int) -> int:
    """Rows to which an expert's are filled up: the fewer it has the fewer."""
    return 16 if assignments < 64 * experts else 32


def _each(
    p: ExpertParams,
    layer: Index,
    x: Array,
    chosen: Array,
    over: Callable[[Callable[..., Array]], Callable[..., Array]],
    product: Product,
    activation: Activation,
) -> tuple[Float[Array, "n D"], Int[Array, "M A"]]:
    """The f32 outputs of every choice, as `over(one)((rows, experts))` gives them, and which one is whose."""

    def one(choice: tuple[Array, Array]) -> Array:
        row, e = choice
        return _expert(at(p, layer, e), row[None], product, activation)[0]

    rows = jnp.broadcast_to(x, (chosen.shape[1], *x.shape)).reshape(-1, x.shape[1])
    place = jnp.arange(chosen.size, dtype=jnp.int32).reshape(chosen.T.shape).T
    return over(one)((rows, chosen.T.reshape(-1))), place


def _grouped(
    p: ExpertParams, layer: Index, x: Array, chosen: Array, valid: Array, activation: Activation
) -> tuple[Float[Array, "n D"], Int[Array, "M A"]]:
    """The outputs of every choice in x's type, expert by expert, and which one is whose (MegaBlocks, arXiv:2211.15841).

    A loop over the experts that a valid row chose decodes each of them once, and multiplies its rows a tile at a time;
    other experts and padding cost nothing. The memory it takes beside x is that of one expert's weights in x's type, of
    M * A + tile outputs in x's type, and of a tile's hidden values.
    """
    n, experts = chosen.size, p.down.shape[1]
    order, starts, active, n_active = group(chosen, valid, experts)
    tile = tile_of(n, experts)
    rows = jnp.pad(order // chosen.shape[1], (0, tile))

    def visit_expert(i: Array, y: Array) -> Array:
        e = active[i]
        one = at(p, layer, e)
        one = replace(
            one,
            gate=dense(one.gate, x.dtype),
            up=None if one.up is None else dense(one.up, x.dtype),
            down=dense(one.down, x.dtype),
        )

        def visit_tile(t: Array, y: Array) -> Array:
            first = starts[e] + t * tile
            part = _expert(one, x[lax.dynamic_slice(rows, (first,), (tile,))], _product, activation)
            # What a tile writes past the end of its group, the groups after it write again.
            return lax.dynamic_update_slice(y, part.astype(y.dtype), (first, 0))

        return lax.fori_loop(0, -(-(starts[e + 1] - starts[e]) // tile), visit_tile, y)

    y = lax.fori_loop(0, n_active, visit_expert, jnp.zeros((n + tile, x.shape[1]), x.dtype))
    place = jnp.zeros(n, order.dtype).at[order].set(jnp.arange(n, dtype=order.dtype), unique_indices=True)
    return y, place.reshape(chosen.shape)


def _product(x: Array, w: Weight) -> Float[Array, "n F"]:
    return matmul_reference(x[None], w, dtype=jnp.float32)[0]


def _expert(p: ExpertParams, x: Array, product: Product, activation: Activation) -> Float[Array, "n D"]:
    """One expert, its parameters without leading axes, on rows x [n, D]."""

    def plus(y: Array, bias: Array | None) -> Array:
        return y if bias is None else y + bias

    gate = plus(product(x, p.gate), p.gate_bias)
    gate, up = jnp.split(gate, 2, axis=-1) if p.up is None else (gate, plus(product(x, p.up), p.up_bias))
    y = plus(product(activation(gate, up).astype(x.dtype), p.down), p.down_bias)
    return y if p.scale is None else y * p.scale


def group(chosen: Int[Array, "M A"], valid: Bool[Array, " M"], experts: int) -> Groups:
    """Groups assignments by a stable sort; those of rows that are not valid belong to no expert."""
    expert = jnp.where(valid[:, None], chosen, experts).reshape(-1)
    starts = (expert[:, None] < jnp.arange(experts + 1)).sum(0, dtype=jnp.int32)
    busy = starts[1:] > starts[:-1]
    return Groups(
        order=jnp.argsort(expert, stable=True),
        starts=starts,
        active=jnp.argsort(~busy, stable=True),
        n_active=busy.sum(dtype=jnp.int32),
    )


def tiles(chosen: Int[Array, "M A"], valid: Bool[Array, " M"], experts: int, tile: int) -> Tiles:
    """Lays assignments out by counting, for GPUs; those of rows that are not valid belong to no expert.

    An assignment's rank is the number of equal ones before it: in its block of about sqrt(M A) by comparing, and in
    the blocks before by their histograms. So a GPU takes a few reductions where a sort passes over all many times; a
    CPU sorts in a fraction of that, see `group`.
    """
    expert = jnp.where(valid[:, None], chosen, experts).reshape(-1)
    n = expert.size
    block = 1 << n.bit_length() // 2
    blocks = jnp.pad(expert, (0, -n % block), constant_values=experts).reshape(-1, block)
    index = jnp.arange(block)
    rank = ((blocks[:, :, None] == blocks[:, None]) & (index[:, None] > index)).sum(2, dtype=jnp.int32)
    counts = (blocks[..., None] == jnp.arange(experts)).sum(1, dtype=jnp.int32)
    before = _sums_before(counts)  # the last: of all blocks
    starts = _sums_before(-(-before[-1] // tile))  # in tiles
    place = jnp.take_along_axis(tile * starts[:-1] + before[:-1], blocks, axis=1, mode="clip") + rank
    place, count = place.reshape(-1)[:n], -(-n // tile) + min(experts, n)
    own = jnp.arange(n, dtype=jnp.int32)
    to = jnp.where(expert < experts, place, count * tile + own)  # distinct and out of range: dropped
    source = jnp.zeros(count * tile, jnp.int32).at[to].set(own // chosen.shape[1], mode="drop", unique_indices=True)
    return Tiles(
        place=jnp.where(expert < experts, place, 0).reshape(chosen.shape),
        source=source,
        starts=starts,
    )


def _sums_before(x: Int[Array, "n *rest"]) -> Int[Array, "n+1 *rest"]:
    """The sums of the first 0, 1, ... n: a single reduction, where a cumulative sum is several."""
    n = len(x)
    earlier = jnp.tri(n + 1, n, -1, bool).reshape(n + 1, n, *(1,) * (x.ndim - 1))
    return jnp.where(earlier, x, 0).sum(1)


def tile_of(assignments: int, experts: int) -> int:
    """Rows of an expert at a time: about as many as it has in the mean, which are then one or two tiles.

    Each tile passes over the expert's weights and ends in up to a tile of rows in vain. A product of 512 rows is no
    longer bound by its weights; under 8 there is nothing to gain.
    """
    mean = -(-assignments // experts)
    return min(max(1 << (mean - 1).bit_length(), 8), 512)
