"""The pre-norm decoder that most architectures are: x += mixer(norm(x)); x += ffn(norm(x)), layer by layer."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer import segments
from jaxinfer.layers.attention import AttentionParams, AttentionSpec, attention
from jaxinfer.layers.delta import DeltaParams, DeltaSpec, delta
from jaxinfer.layers.mlp import MlpParams, mlp, silu_gate
from jaxinfer.layers.moe import MoeParams, MoeSpec, moe
from jaxinfer.layers.norm import rms_norm
from jaxinfer.ops import Ops
from jaxinfer.ops.experts import Activation
from jaxinfer.ops.matmul import Norm
from jaxinfer.quants import Weight, dense, rows
from jaxinfer.tree import Index, pytree, static

NO_LAYERS = segments.Layers((), ())


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: int
    width: int
    vocab: int
    context: int  # tokens that the model was trained for
    eps: float
    dtype: np.dtype  # of activations
    mixers: tuple[tuple[str, AttentionSpec | DeltaSpec], ...]  # by kind of layer
    moe: MoeSpec | None = None
    activation: Activation = silu_gate  # of feed-forward layers without experts
    embedding_scale: float = 1.0
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)

    def mixer(self, kind: str) -> AttentionSpec | DeltaSpec:
        return dict(self.mixers)[kind]


@pytree
class LayerParams:
    norm: Array  # [R, D]
    mixer: AttentionParams | DeltaParams
    ffn_norm: Array  # [R, D]
    ffn: MlpParams | MoeParams
    post_norm: Array | None = None  # [R, D], of the mixer's output
    ffn_post_norm: Array | None = None  # [R, D]
    kind: str = static(default="full")  # which of the config's mixers


@pytree
class Params:
    embedding: Weight  # [V, D]
    layers: segments.Layers  # of LayerParams
    norm: Array  # [D]
    head: Weight | None  # [V, D]; None: the embedding serves as the head
    head_bias: Array | None = None  # [V]
    sharing: segments.Layers = NO_LAYERS  # the last layers, where they read the keys of the last one of a kind
    draft: Any = None  # a block that predicts the token after next, where the file has one


def init_cache(params: Params, batch: int, slots: int, chunk: int, config: Config, dtype: np.dtype) -> Any:
    """A cache for each stack of layers."""
    found = zip(params.layers.stacks, params.layers.repeats, strict=True)
    return tuple(config.mixer(layer.kind).cache(repeats, batch, slots, chunk, dtype) for layer, repeats in found)


def last_of(layers: segments.Layers, kind: str) -> int:
    """The stack with the last layer of a kind, which is the stack's last."""
    return [k for k, _ in layers.places() if layers.stacks[k].kind == kind][-1]


def forward(
    params: Params, tokens: Int[Array, "B T"], pos: Int[Array, "B T"], cache: Any, config: Config, ops: Ops
) -> tuple[Float[Array, "B T D"], Any]:
    """All layers, on tokens at their positions (below zero: padding). Returns (x before the last norm, cache)."""

    def step(p: LayerParams, i: Index, x: Array, held: Any) -> tuple[Array, Any]:
        return layer(p, i, x, pos, held, config, ops)

    return segments.run(params.layers, cache, embed(params.embedding, tokens, config), step)


def embed(embedding: Weight, tokens: Int[Array, "B T"], config: Config) -> Float[Array, "B T D"]:
    x = dense(rows(embedding, tokens), jnp.float32) * config.embedding_scale
    return x.astype(config.dtype)


def layer(
    p: LayerParams,
    i: Index,
    x: Float[Array, "B T D"],
    pos: Int[Array, "B T"],
    cache: Any,
    config: Config,
    ops: Ops,
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer of either kind: x += mixer(norm(x)); x += ffn(norm(x)), each normed again where it has a post norm."""
    spec: Any = config.mixer(p.kind)
    norm, before = Norm(p.norm, config.eps), x if p.post_norm is None else None
    if isinstance(spec, DeltaSpec):
        assert isinstance(p.mixer, DeltaParams)
        y, cache = delta(p.mixer, i, x, pos, cache, spec, ops, norm=norm, residual=before)
    else:
        assert isinstance(p.mixer, AttentionParams)
        y, cache = attention(p.mixer, i, x, pos, cache, spec, ops, norm=norm, residual=before)
    x = y if p.post_norm is None else x + rms_norm(y, p.post_norm[i], config.eps)
    norm, before = Norm(p.ffn_norm, config.eps), x if p.ffn_post_norm is None else None
    if isinstance(p.ffn, MlpParams):
        y = mlp(p.ffn, i, x, config.activation, ops, norm=norm, residual=before)
    else:
        assert config.moe is not None
        y = moe(p.ffn, i, x, pos, config.moe, ops, norm=norm, residual=before)
    return y if p.ffn_post_norm is None else x + rms_norm(y, p.ffn_post_norm[i], config.eps), cache


def logits(params: Params, x: Float[Array, "B T D"], config: Config, ops: Ops) -> Float[Array, "B T V"]:
    """Scores of every token of the vocabulary, f32."""
    return head(params, rms_norm(x, params.norm, config.eps), config, ops)


def head(params: Params, x: Float[Array, "B T D"], config: Config, ops: Ops) -> Float[Array, "B T V"]:
    """Scores from what the last norm made."""
    y = ops.matmul(x, params.embedding if params.head is None else params.head, dtype=jnp.float32)
    if params.head_bias is not None:
        y = y + params.head_bias.astype(jnp.float32)
    return y if config.softcap is None else config.softcap * jnp.tanh(y / config.softcap)
