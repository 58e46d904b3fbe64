"""A router's scores of tokens, and the choice of experts from them."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.layers.routing import Routing
from jaxinfer.ops.form import form
from jaxinfer.ops.matmul import MOST, Norm, normed
from jaxinfer.pallas import route
from jaxinfer.quants import Packed, Weight
from jaxinfer.tree import Index


def scores_reference(
    x: Float[Array, "B T D"],
    router: Weight,
    layer: Index,
    *,
    matmul: Callable[..., Array],
    norm: Norm | None = None,
    gate: Float[Array, "R D"] | None = None,
) -> tuple[Float[Array, "B T E"], Float[Array, "B T"] | None]:
    """router[layer] x and gate[layer] x in f32, for a router [R, E, D], x normed before if there is a norm."""
    y = normed(x, norm, layer).astype(jnp.float32)
    scores = matmul(y, router, layer)
    return scores, None if gate is None else (y * gate[layer].astype(jnp.float32)).sum(-1)


def scores_ampere(
    x: Float[Array, "B T D"],
    router: Weight,
    layer: Index,
    *,
    norm: Norm | None = None,
    gate: Float[Array, "R D"] | None = None,
    **options: Callable[..., Array],
) -> tuple[Float[Array, "B T E"], Float[Array, "B T"] | None]:
    """The reference's scores; for few tokens and a router in f32 in one launch with the norm."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > MOST:
        return scores_reference(x, router, layer, norm=norm, gate=gate, **options)
    if why := "a packed router" if isinstance(router, Packed) else route.beyond_score(rows, router):
        with form("by XLA", why):
            return scores_reference(x, router, layer, norm=norm, gate=gate, **options)
    with form("one launch with the norm"):
        before = (norm.weight, norm.eps) if norm else (None, None)
        scores, gates = route.score(rows, router, layer, *before, gate)
        return scores.reshape(*x.shape[:-1], -1), None if gates is None else gates.reshape(x.shape[:-1])


def route_reference(
    scores: Float[Array, "M E"], used: int, routing: Routing
) -> tuple[Int[Array, "M A"], Float[Array, "M A"]]:
    """A recipe's choice and weights."""
    return routing(scores, used)


def route_ampere(
    scores: Float[Array, "M E"], used: int, routing: Routing
) -> tuple[Int[Array, "M A"], Float[Array, "M A"]]:
    """The reference's choice, in one launch for the recipes that there are."""
    if why := route.beyond(scores.shape[1], used, routing):
        with form("by XLA", why):
            return route_reference(scores, used, routing)
    with form("one launch"):
        return route.route(scores, used, routing)
