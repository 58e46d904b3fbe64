"""Mixture of experts: a router chooses a few feed-forward networks for each token."""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.layers.linear import Linear
from jaxinfer.layers.mlp import MlpParams, mlp
from jaxinfer.layers.routing import Routing
from jaxinfer.ops import Ops
from jaxinfer.ops.experts import Activation, ExpertParams
from jaxinfer.ops.matmul import Norm, normed
from jaxinfer.pallas.reduce import reduce_reference
from jaxinfer.tree import Index, pytree


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
    routing: Routing  # one of layers/routing.py
    activation: Activation  # of the experts, shared or not
    weigh_inputs: bool = False  # an expert's weight multiplies its input and not its output


def moe(
    p: MoeParams,
    layer: Index,
    x: Float[Array, "B T D"],
    pos: Int[Array, "B T"],
    spec: MoeSpec,
    ops: Ops,
    *,
    norm: Norm | None = None,
    router_input: Float[Array, "B T D"] | None = None,
    residual: Float[Array, "B T D"] | None = None,
) -> Float[Array, "B T D"]:
    """The weighted sum of each token's experts in the order of their rank, then the shared expert, then a residual.

    All of them take x normed, if there is a norm, and are summed in f32. The router computes in f32, from
    `router_input` where that is not the same. Positions below zero mark padding, for which no expert is run.
    """
    if p.shared_gate is not None and router_input is not None:
        raise ValueError("the gate of a shared expert takes what the router does, which is not what experts take here")
    routed_by, before = (x, norm) if router_input is None else (router_input, None)
    scores, gate = ops.scores(routed_by, p.router.weight, layer, matmul=ops.matmul, norm=before, gate=p.shared_gate)
    scores = scores if p.router.bias is None else scores + p.router.bias[layer]
    rows, valid = x.reshape(-1, x.shape[-1]), (pos >= 0).reshape(-1)
    chosen, weights = ops.route(scores.reshape(len(rows), -1), spec.used, spec.routing)
    added = {} if residual is None else {"residual": residual.reshape(rows.shape)}
    if p.shared is not None:
        added["shared"] = mlp(p.shared, layer, x, spec.activation, ops, norm=norm).reshape(rows.shape)
        if gate is not None:
            added["gate"] = gate.reshape(-1)
    routed = partial(ops.experts, p.experts, layer, activation=spec.activation)
    if not spec.weigh_inputs:
        return routed(rows, chosen, weights, valid, norm=norm, dtype=x.dtype, **added).reshape(x.shape)
    # A choice is a row of its own then, with one expert and the weight 1.
    alone, ones = chosen.reshape(-1, 1), jnp.ones((chosen.size, 1), jnp.float32)
    each = weights[..., None] * normed(x, norm, layer).reshape(rows.shape)[:, None].astype(jnp.float32)
    each = each.astype(x.dtype).reshape(-1, x.shape[-1])
    y = routed(each, alone, ones, jnp.repeat(valid, spec.used), dtype=jnp.float32)
    place = jnp.arange(chosen.size, dtype=jnp.int32).reshape(chosen.shape)
    y = reduce_reference(y, place, jnp.ones_like(weights), valid, dtype=x.dtype, **added)
    return y.reshape(x.shape)
