"""The attention that the keys of a layer get from the last queries, which presses go by."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.ops.attention import visible
from jaxinfer.ops.form import form
from jaxinfer.pallas.votes import beyond, votes
from jaxinfer.quants import at
from jaxinfer.tree import Index


def attention_received(
    queries: Float[Array, "B W K G H"],
    valid: Bool[Array, "B W"],
    k: Float[Array, "B K S H"],
    pos: Int[Array, "B P S"],
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B K G S"]:
    """The attention that each key gets from the last W tokens, summed over the valid ones: causal, softmax in f32 over
    all keys and the head's sink. A position < 0 marks an empty slot.

    A KV head at a time: all logits of 64 queries of 32 heads on 131,072 keys would take a gigabyte.
    """
    at_pos = query_positions(queries, pos)

    def one_head(head: tuple) -> Array:
        q, k, pos, sink = head
        operands = q.astype(jnp.float32), k.astype(jnp.float32)
        s = jnp.einsum("bwgh,bsh->bgws", *operands, precision=lax.Precision.HIGHEST)
        seen = visible(at_pos, pos[:, None], None) & valid[:, None, :, None]
        return softmax_of_seen(s, seen, None if sink is None else sink[:, None]).sum(2)

    heads = (queries.swapaxes(1, 2), k, jnp.broadcast_to(pos, k.shape[:3]))
    return map_heads(one_head, heads, sinks)


@form("all keys of a head at once")
def votes_reference(
    queries: Float[Array, "B W K G H"],
    valid: Bool[Array, "B W"],
    k: Float[Array, "R B K S H"],
    layer: Index,
    pos: Int[Array, "B P S"],
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B K G S"]:
    """`attention_received` of one layer of a stack of keys; positions and sinks are the layer's."""
    return attention_received(queries, valid, at(k, layer), pos, sinks)


def votes_hopper(
    queries: Float[Array, "B W K G H"],
    valid: Bool[Array, "B W"],
    k: Float[Array, "R B K S H"],
    layer: Index,
    pos: Int[Array, "B P S"],
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B K G S"]:
    """The reference's votes through kernels for GPUs of compute capability 9.0, see `pallas.votes`."""
    if why := beyond(queries.shape[1], k.shape[4], k.dtype):
        with form("all keys of a head at once", why):
            return attention_received(queries, valid, at(k, layer), pos, sinks)
    with form("two passes over the stack's keys"):
        return votes(queries, valid, k, layer, pos, sinks)


def map_heads(one: Callable[[tuple], Array], heads: tuple[Array, ...], sinks: Array | None) -> Array:
    """one((*heads without their second axis, K; sinks [G] or None)) for each KV head, stacked as that axis."""
    kv_heads = heads[0].shape[1]
    by_head = None if sinks is None else sinks.astype(jnp.float32).reshape(kv_heads, -1)
    return lax.map(one, (*(x.swapaxes(0, 1) for x in heads), by_head)).swapaxes(0, 1)


def softmax_of_seen(s: Float[Array, "*n S"], seen: Bool[Array, "*#n S"], sink: Array | None) -> Float[Array, "*n S"]:
    """Over the keys that are seen, zeros where none is; a sink is one more key, whose share nobody gets."""
    s = jnp.where(seen, s, -jnp.inf)
    weights = jnp.where(seen, jax.nn.softmax(s), 0)
    if sink is None:
        return weights
    return weights * jax.nn.sigmoid(jax.nn.logsumexp(s, -1, keepdims=True) - sink[..., None])


def newest(pos: Int[Array, "B P S"]) -> Int[Array, "B 1 1"]:
    return pos.max((1, 2), keepdims=True)


def query_positions(queries: Array, pos: Int[Array, "B P S"]) -> Int[Array, "B W"]:
    """Those of the last queries of each row, which are there with their keys; below zero for padding."""
    return newest(pos)[:, 0] - jnp.arange(queries.shape[1])[::-1]
