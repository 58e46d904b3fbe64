"""Routed experts: each row of activations passes through the few networks that were chosen for it."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.ops.form import form
from jaxinfer.ops.matmul import FEW, matmul_reference
from jaxinfer.quants import Weight, at, dense
from jaxinfer.tree import Index, pytree

type Activation = Callable[[Array, Array], Array]  # (gate, up) -> hidden
type Product = Callable[[Array, Weight], Array]  # rows [n, D], a weight [F, D] -> f32 [n, F]


@pytree
class ExpertParams:
    """Gated feed-forward networks of width F, E of them behind the repeats of a segment."""

    gate: Weight  # [R, E, F, D], or [R, E, 2F, D] where `up` is None: the gate's rows, then those of up
    up: Weight | None  # [R, E, F, D]
    down: Weight  # [R, E, D, F]
    gate_bias: Array | None = None  # [R, E, F], or [R, E, 2F]
    up_bias: Array | None = None  # [R, E, F]
    down_bias: Array | None = None  # [R, E, D]
    scale: Array | None = None  # [R, E], of an expert's output with its bias


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
) -> Float[Array, "M D"]:
    """The sum over a of weights[m, a] * expert[chosen[m, a]](x[m]), in the order of a; f32, zeros where not valid.

    An expert is scale * (down @ activation(gate @ x + bias, up @ x + bias) + bias): operands in x's type, the rest in
    f32. Many rows are grouped by expert, see `_grouped` for what that takes; few pass one choice after the other.
    """
    if len(x) > FEW:
        with form("grouped by expert"):
            y = _grouped(p, layer, x, chosen, valid, activation)
    else:
        with form("choice by choice"):
            y = _each(p, layer, x, chosen, lambda one: partial(lax.map, one), _product, activation)
    return _weighted(y, weights, valid)


def experts_gpu(
    p: ExpertParams,
    layer: Index,
    x: Float[Array, "M D"],
    chosen: Int[Array, "M A"],
    weights: Float[Array, "M A"],
    valid: Bool[Array, " M"],
    *,
    activation: Activation,
) -> Float[Array, "M D"]:
    """The reference's sum; few rows are multiplied and summed as in `matmul_gpu`, all of their choices at once.

    Picking the experts, decoding and product are then one fusion, which reads the chosen ones where they lie.
    """
    if len(x) > FEW:
        return experts_reference(p, layer, x, chosen, weights, valid, activation=activation)

    def product(x: Array, w: Weight) -> Array:
        return (x[:, None].astype(jnp.float32) * dense(w)).sum(-1)

    with form("all choices at once, in place"):
        y = _each(p, layer, x, chosen, jax.vmap, product, activation)
    return _weighted(y, weights, valid)


def _weighted(outputs: Iterable[Array], weights: Array, valid: Array) -> Float[Array, "M D"]:
    """The A outputs of every row by their weights. A fold written out: the order of an f32 `sum` is not defined."""
    total = jnp.zeros((), jnp.float32)
    for w, y in zip(weights.T, outputs, strict=True):
        total += w[:, None] * y.astype(jnp.float32)
    return jnp.where(valid[:, None], total, 0)


def _each(
    p: ExpertParams,
    layer: Index,
    x: Array,
    chosen: Array,
    over: Callable[[Callable[..., Array]], Callable[..., Array]],
    product: Product,
    activation: Activation,
) -> Array:
    """The outputs of every choice, f32 [A, M, D], as `over(one)((rows, experts))` gives them."""

    def one(choice: tuple[Array, Array]) -> Array:
        row, e = choice
        return _expert(at(p, layer, e), row[None], product, activation)[0]

    rows = jnp.broadcast_to(x, (chosen.shape[1], *x.shape)).reshape(-1, x.shape[1])
    return over(one)((rows, chosen.T.reshape(-1))).reshape(*chosen.T.shape, -1)


def _grouped(
    p: ExpertParams, layer: Index, x: Array, chosen: Array, valid: Array, activation: Activation
) -> list[Array]:
    """The A outputs of every row, each [M, D] in x's type, expert by expert (MegaBlocks, arXiv:2211.15841).

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
    return [y[to] for to in place.reshape(chosen.shape).T]


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


def tile_of(assignments: int, experts: int) -> int:
    """Rows of an expert at a time: about as many as it has in the mean, which are then one or two tiles.

    Each tile passes over the expert's weights and ends in up to a tile of rows in vain. A product of 512 rows is no
    longer bound by its weights; under 8 there is nothing to gain.
    """
    mean = -(-assignments // experts)
    return min(max(1 << (mean - 1).bit_length(), 8), 512)
