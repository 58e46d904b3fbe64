"""The choice of experts for tokens, from a router's scores."""

from jaxtyping import Array, Float, Int

from jaxinfer.layers.routing import Routing
from jaxinfer.ops.form import form
from jaxinfer.pallas import route


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
