"""Gemma 4, in all its forms: windows on most layers, wider heads on the others, and up to three additions.

E2B and E4B add an embedding of each token to every layer, and their last layers share the keys and values of earlier
ones; 26B-A4B has experts beside each feed-forward layer; in 12B, 26B and 31B the values of full layers are their keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer import decoder, segments
from jaxinfer.cache import KVCache
from jaxinfer.decoder import embed, init_cache, last_of, logits
from jaxinfer.layers.attention import AttentionParams, AttentionSpec, attention
from jaxinfer.layers.linear import Linear, linear
from jaxinfer.layers.mlp import MlpParams, gelu_gate, mlp
from jaxinfer.layers.moe import MoeParams, moe
from jaxinfer.layers.norm import rms_norm
from jaxinfer.layers.rope import Rope
from jaxinfer.layers.routing import softmax_renormalised
from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.ops import Ops
from jaxinfer.ops.matmul import Norm
from jaxinfer.quants import Weight, dense, rows
from jaxinfer.reading import Block, attention_spec, blocks, config, moe_spec, params, rope
from jaxinfer.tree import Index, pytree, static

__all__ = ["Config", "Params", "forward", "init_cache", "load", "logits"]


@dataclass(frozen=True, kw_only=True)
class Config(decoder.Config):
    inputs: int  # P, the width of each layer's own embedding of a token, or 0


@pytree
class ExpertsParams:
    """Experts beside a layer's feed-forward network, which see and give differently normed values."""

    moe: MoeParams
    router_scale: Array  # [R, D]
    norm: Array  # [R, D]
    post_norm: Array  # [R, D], of the experts' sum
    dense_norm: Array  # [R, D], of the feed-forward network's output


@pytree
class InputParams:
    """What a layer does with its own embedding of a token."""

    gate: Linear  # [R, P, D]
    proj: Linear  # [R, D, P]
    norm: Array  # [R, D]


@pytree
class LayerParams:
    norm: Array  # [R, D]
    mixer: AttentionParams
    post_norm: Array  # [R, D]
    ffn_norm: Array  # [R, D]
    ffn: MlpParams
    ffn_post_norm: Array  # [R, D]
    experts: ExpertsParams | None
    input: InputParams | None
    scale: Array | None  # [R, 1], of the layer's output
    kind: str = static()


@pytree
class EmbeddingParams:
    """All layers' own embeddings of a token, and what they add to them of the token's own."""

    table: Weight  # [V, L*P]
    proj: Linear  # [L*P, D]
    norm: Array  # [P]


@pytree
class Params(decoder.Params):
    inputs: EmbeddingParams | None = None


def load(metadata: Metadata, weights: Weights, dtype: np.dtype) -> tuple[Config, Params]:
    layers, d = blocks(metadata, weights), metadata.whole("embedding_length")
    own = layers - metadata.whole("attention.shared_kv_layers", 0, least=0, most=layers - 1)
    kinds = ["sliding" if s else "full" for s in metadata.flags("attention.sliding_window_pattern", layers)]
    if missing := set(kinds) - set(kinds[:own]):
        rule = f"less: no layer before has {missing.pop()} attention"
        raise metadata.wrong("attention.shared_kv_layers", layers - own, rule)
    mixers = _mixers(metadata, weights, kinds)
    experts = metadata.whole("expert_count", 0, least=0)
    common = config(
        metadata,
        weights,
        dtype,
        mixers=tuple(mixers.items()),
        moe=moe_spec(metadata, softmax_renormalised, gelu_gate) if experts else None,
        activation=gelu_gate,
        embedding_scale=d**0.5,
        softcap=metadata.number("final_logit_softcapping", 30.0),
    )
    whole = Config(**vars(common), inputs=metadata.whole("embedding_length_per_layer_input", least=0))
    ffn = metadata.wholes("feed_forward_length", layers)
    expert_ffn = metadata.whole("expert_feed_forward_length") if experts else 0

    def layer(block: Block, i: int) -> LayerParams:
        parts = "qkv" if "attn_v" in block or "attn_qkv" in block else "qk"
        if i >= own:
            parts = "q"
            for name in ("attn_k", "attn_v", "attn_k_norm"):
                weights.unused(f"{block.prefix}{name}.weight")
        return LayerParams(
            norm=block.norm("attn_norm", d),
            mixer=block.attention(mixers[kinds[i]], d, norms="head", parts=parts),
            post_norm=block.norm("post_attention_norm", d),
            ffn_norm=block.norm("ffn_norm", d),
            ffn=block.mlp(ffn[i], d),
            ffn_post_norm=block.norm("post_ffw_norm", d),
            experts=_experts(block, experts, expert_ffn, d) if experts else None,
            input=_input(block, whole.inputs, d) if whole.inputs else None,
            scale=weights.optional(f"{block.prefix}layer_output_scale.weight", 1),
            kind=kinds[i],
        )

    read = params(weights, whole, layer, layers=own)
    tail = [layer(Block(weights, f"blk.{i}."), i) for i in range(own, layers)]
    inputs = _embedding(weights, whole) if whole.inputs else None
    return whole, Params(**{**vars(read), "sharing": weights.layers(tail)}, inputs=inputs)


def _mixers(metadata: Metadata, weights: Weights, kinds: Sequence[str]) -> dict[str, AttentionSpec]:
    """The kinds of attention that there are layers of."""
    kv_heads = metadata.wholes("attention.head_count_kv", len(kinds), metadata.whole("attention.head_count"))

    def spec(kind: str, turn: Callable[[int], Rope], **own: Any) -> AttentionSpec:
        found = {n for n, k in zip(kv_heads, kinds, strict=True) if k == kind}
        if len(found) > 1:
            raise metadata.wrong("attention.head_count_kv", np.array(kv_heads), f"the same for all {kind} layers")
        return attention_spec(metadata, turn, kv_heads=found.pop(), scale=1.0, norm_values=True, **own)

    mixers = {}
    for key in ("attention.value_length", "rope.freq_base"):
        metadata.get(key, None)  # of full layers, which there may be none of
    if "full" in kinds:
        divisors = partial(weights.values, "rope_freqs.weight", needed=True)
        mixers["full"] = spec("full", rope(metadata, interleaved=False, divisors=divisors))
    if "sliding" in kinds:
        turn = rope(metadata, interleaved=False, suffix="_swa", scaled=False)
        width, window = metadata.whole("attention.key_length"), metadata.whole("attention.sliding_window")
        mixers["sliding"] = spec("sliding", turn, suffix="_swa", width=width, window=window)
    return mixers


def _embedding(weights: Weights, config: Config) -> EmbeddingParams:
    rows = config.layers * config.inputs
    return EmbeddingParams(
        table=weights("per_layer_token_embd.weight", config.vocab, rows, keep=True),
        proj=Linear(weights("per_layer_model_proj.weight", rows, config.width)),
        norm=weights("per_layer_proj_norm.weight", config.inputs),
    )


def _input(block: Block, inputs: int, width: int) -> InputParams:
    return InputParams(
        gate=block.linear("inp_gate", inputs, width),
        proj=block.linear("proj", width, inputs),
        norm=block.norm("post_norm", width),
    )


def _experts(block: Block, experts: int, ffn: int, width: int) -> ExpertsParams:
    return ExpertsParams(
        moe=block.moe(experts, ffn, width),
        router_scale=block.weights(f"{block.prefix}ffn_gate_inp.scale", width),
        norm=block.norm("pre_ffw_norm_2", width),
        post_norm=block.norm("post_ffw_norm_2", width),
        dense_norm=block.norm("post_ffw_norm_1", width),
    )


def forward(
    params: Params, tokens: Int[Array, "B T"], pos: Int[Array, "B T"], cache: Any, config: Config, ops: Ops
) -> tuple[Float[Array, "B T D"], Any]:
    """All layers, on tokens at their positions (below zero: padding). Returns (x before the last norm, cache)."""
    x = embed(params.embedding, tokens, config)
    inputs = None if params.inputs is None else _inputs(params.inputs, tokens, x, config, ops)

    def layer(p: LayerParams, i: Index, carry: tuple[Array, Array], held: KVCache, **shared: Any):
        x, number = carry
        spec: Any = config.mixer(p.kind)
        y, held = attention(p.mixer, i, x, pos, held, spec, ops, norm=Norm(p.norm, config.eps), **shared)
        x = x + rms_norm(y, p.post_norm[i], config.eps)
        x = x + rms_norm(_feed_forward(p, i, x, pos, config, ops), p.ffn_post_norm[i], config.eps)
        if p.input is not None:
            assert inputs is not None
            own = lax.dynamic_index_in_dim(inputs, number, axis=2, keepdims=False)
            y = linear(p.input.proj, i, gelu_gate(linear(p.input.gate, i, x, ops), own), ops)
            x = x + rms_norm(y, p.input.norm[i], config.eps)
        if p.scale is not None:
            x = (x.astype(jnp.float32) * p.scale[i].astype(jnp.float32)).astype(x.dtype)
        return (x, number + 1), held

    carry, cache = segments.run(params.layers, cache, (x, jnp.int32(0)), layer)
    if not params.sharing.stacks:
        return carry[0], cache
    places = {kind: last_of(params.layers, kind) for kind, _ in config.mixers}
    sources = {kind: cache[k] for kind, k in places.items()}
    recent = {kind: (held.recent_q, jnp.int32(held.k.shape[0])) for kind, held in sources.items()}

    def sharing(p: LayerParams, i: Index, carry: tuple[Any, Any], held: None):
        carry, recent = carry
        (queries, reader), source = recent[p.kind], sources[p.kind]
        seen = replace(source, recent_q=queries)
        carry, seen = layer(p, i, carry, seen, source=source.k.shape[0] - 1, reader=reader)
        return (carry, recent | {p.kind: (seen.recent_q, reader + 1)}), held

    nothing = (None,) * len(params.sharing.stacks)
    ((x, _), recent), _ = segments.run(params.sharing, nothing, (carry, recent), sharing)
    held = list(cache)
    for kind, k in places.items():
        held[k] = replace(sources[kind], recent_q=recent[kind][0])
    return x, tuple(held)


def _inputs(
    p: EmbeddingParams, tokens: Int[Array, "B T"], x: Float[Array, "B T D"], config: Config, ops: Ops
) -> Float[Array, "B T L P"]:
    """Every layer's own embedding of the tokens: half from a table, half from the tokens' common embedding."""
    shape = (*tokens.shape, -1, config.inputs)
    table = dense(rows(p.table, tokens), jnp.float32).reshape(shape) * config.inputs**0.5
    common = linear(p.proj, None, x, ops).astype(jnp.float32).reshape(shape) * config.width**-0.5
    return ((rms_norm(common, p.norm, config.eps) + table) * 0.5**0.5).astype(x.dtype)


def _feed_forward(
    p: LayerParams, i: Index, x: Float[Array, "B T D"], pos: Int[Array, "B T"], config: Config, ops: Ops
) -> Float[Array, "B T D"]:
    y = mlp(p.ffn, i, x, config.activation, ops, norm=Norm(p.ffn_norm, config.eps))
    if p.experts is None:
        return y
    e = p.experts
    assert config.moe is not None
    router = rms_norm(x.astype(jnp.float32), None, config.eps) * config.width**-0.5 * e.router_scale[i]
    routed = moe(e.moe, i, x, pos, config.moe, ops, norm=Norm(e.norm, config.eps), router_input=router)
    return rms_norm(y, e.dense_norm[i], config.eps) + rms_norm(routed, e.post_norm[i], config.eps)
