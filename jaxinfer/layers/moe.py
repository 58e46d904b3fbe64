"""Mixture of experts: a router chooses a few feed-forward networks for each token."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.layers.linear import Linear, linear
from jaxinfer.layers.mlp import MlpParams, mlp
from jaxinfer.ops import Ops
from jaxinfer.ops.experts import Activation, ExpertParams
from jaxinfer.tree import Index, pytree

type Routing = Callable[[Array, int], tuple[Array, Array]]  # (f32 scores [M, E], A) -> (chosen [M, A], weights [M, A])


@pytree
class MoeParams:
    router: Linear  # [R, E, D]
    experts: ExpertParams
    shared: MlpParams | None = None  # an expert that all tokens pass through
    shared_gate: Array | None = None  # [R, D]; None: the shared expert has the weight 1


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """What the mixtures of a model have in common."""

    used: int  # experts per token, A
    routing: Routing  # one of the recipes below
    activation: Activation  # of the experts, shared or not
    weigh_inputs: bool = False  # an expert's weight multiplies its input and not its output


# The recipes: from f32 scores of all experts to the A chosen ones, best first, and their weights. Among equals the
# lowest index goes first.


def softmax_renormalised(scores: Float[Array, "M E"], used: int) -> tuple[Int[Array, "M A"], Float[Array, "M A"]]:
    """Softmax, the best of it, their sum made 1; a sum below f16's least normal number counts as that, as in ggml."""
    chosen, weights = softmax_of_all(scores, used)
    return chosen, weights / jnp.maximum(weights.sum(-1, keepdims=True), 2.0**-14)


def softmax_of_all(scores: Float[Array, "M E"], used: int) -> tuple[Int[Array, "M A"], Float[Array, "M A"]]:
    """Softmax, and the best of it as they are."""
    weights, chosen = lax.top_k(jax.nn.softmax(scores), used)
    return chosen, weights


def softmax_of_chosen(scores: Float[Array, "M E"], used: int) -> tuple[Int[Array, "M A"], Float[Array, "M A"]]:
    """Softmax over the best alone."""
    best, chosen = lax.top_k(scores, used)
    return chosen, jax.nn.softmax(best)


def sigmoid_of_chosen(scores: Float[Array, "M E"], used: int) -> tuple[Int[Array, "M A"], Float[Array, "M A"]]:
    """Sigmoid of the best, each by itself."""
    best, chosen = lax.top_k(scores, used)
    return chosen, jax.nn.sigmoid(best)


def moe(
    p: MoeParams,
    layer: Index,
    x: Float[Array, "B T D"],
    pos: Int[Array, "B T"],
    spec: MoeSpec,
    ops: Ops,
    *,
    router_input: Float[Array, "B T D"] | None = None,
) -> Float[Array, "B T D"]:
    """The weighted sum of each token's experts in the order of their rank, then the shared expert; summed in f32.

    The router computes in f32, from `router_input` where that is not x. Positions below zero mark padding, for which
    no expert is run.
    """
    scores = linear(p.router, layer, (x if router_input is None else router_input).astype(jnp.float32), ops)
    chosen, weights = spec.routing(scores.reshape(-1, scores.shape[-1]), spec.used)
    y = _routed(p.experts, layer, x.reshape(-1, x.shape[-1]), chosen, weights, (pos >= 0).reshape(-1), spec, ops)
    y = y.reshape(x.shape)
    if p.shared is not None:
        shared = mlp(p.shared, layer, x, spec.activation, ops).astype(jnp.float32)
        if p.shared_gate is not None:
            gate = (x.astype(jnp.float32) * p.shared_gate[layer].astype(jnp.float32)).sum(-1, keepdims=True)
            shared *= jax.nn.sigmoid(gate)
        y += shared
    return y.astype(x.dtype)


def _routed(
    p: ExpertParams, layer: Index, x: Array, chosen: Array, weights: Array, valid: Array, spec: MoeSpec, ops: Ops
) -> Float[Array, "M D"]:
    if not spec.weigh_inputs:
        return ops.experts(p, layer, x, chosen, weights, valid, activation=spec.activation)
    # A choice is a row of its own then, with one expert and the weight 1.
    rows = (weights[..., None] * x[:, None].astype(jnp.float32)).astype(x.dtype).reshape(-1, x.shape[1])
    alone, ones = chosen.reshape(-1, 1), jnp.ones((chosen.size, 1), jnp.float32)
    y = ops.experts(p, layer, rows, alone, ones, jnp.repeat(valid, spec.used), activation=spec.activation)
    return reduce(jnp.add, y.reshape(*chosen.shape, -1).swapaxes(0, 1))
