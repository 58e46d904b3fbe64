"""How published models choose experts: from f32 scores of all to the A chosen ones, best first, and their weights.

Among equals the lowest index goes first. Softmax keeps the order, so scores decide: what is chosen depends on no
device's exp.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

type Routing = Callable[[Array, int], tuple[Array, Array]]  # (f32 scores [M, E], A) -> (chosen [M, A], weights [M, A])


def softmax_renormalised(scores: Float[Array, "M E"], used: int) -> tuple[Int[Array, "M A"], Float[Array, "M A"]]:
    """Softmax, the best of it, their sum made 1; a sum below f16's least normal number counts as that, as in ggml."""
    chosen, weights = softmax_of_all(scores, used)
    return chosen, weights / jnp.maximum(weights.sum(-1, keepdims=True), 2.0**-14)


def softmax_of_all(scores: Float[Array, "M E"], used: int) -> tuple[Int[Array, "M A"], Float[Array, "M A"]]:
    """Softmax, and the best of it as they are."""
    _, chosen = lax.top_k(scores, used)
    return chosen, jnp.take_along_axis(jax.nn.softmax(scores), chosen, axis=-1)


def softmax_of_chosen(scores: Float[Array, "M E"], used: int) -> tuple[Int[Array, "M A"], Float[Array, "M A"]]:
    """Softmax over the best alone."""
    best, chosen = lax.top_k(scores, used)
    return chosen, jax.nn.softmax(best)


def sigmoid_of_chosen(scores: Float[Array, "M E"], used: int) -> tuple[Int[Array, "M A"], Float[Array, "M A"]]:
    """Sigmoid of the best, each by itself."""
    best, chosen = lax.top_k(scores, used)
    return chosen, jax.nn.sigmoid(best)


ROUTINGS = softmax_renormalised, softmax_of_all, softmax_of_chosen, sigmoid_of_chosen
