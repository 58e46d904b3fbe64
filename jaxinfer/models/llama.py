"""Llama 1 to 3.x, Mistral, SmolLM: the pre-norm decoder that qwen2 and qwen3 share."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer import cache, segments
from jaxinfer.cache import KVCache
from jaxinfer.layers.attention import AttentionParams, AttentionSpec, attention
from jaxinfer.layers.linear import Linear
from jaxinfer.layers.mlp import MlpParams, swiglu
from jaxinfer.layers.norm import rms_norm
from jaxinfer.layers.rope import Rope, Yarn, frequencies, yarn_frequencies, yarn_magnitude
from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.ops import Ops
from jaxinfer.quants import Weight, dense, rows
from jaxinfer.tree import Index, pytree


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: int
    width: int
    ffn: int
    vocab: int
    context: int  # tokens that the model was trained for
    eps: float
    attention: AttentionSpec
    dtype: np.dtype  # of activations


@pytree
class LayerParams:
    attention_norm: Array  # [R, D]
    attention: AttentionParams
    ffn_norm: Array  # [R, D]
    ffn: MlpParams


@pytree
class Params:
    embedding: Weight  # [V, D]
    layers: tuple[segments.Segment, ...]  # of LayerParams
    norm: Array  # [D]
    head: Weight | None  # [V, D]; None: the embedding serves as the head
    head_bias: Array | None  # [V]


def load(metadata: Metadata, weights: Weights, dtype: np.dtype) -> tuple[Config, Params]:
    """Reads the configuration and names every tensor (docs of GGUF's `llama` architecture)."""
    return load_decoder(metadata, weights, dtype, interleaved=True, head_norms=False)


def load_decoder(
    metadata: Metadata, weights: Weights, dtype: np.dtype, *, interleaved: bool, head_norms: bool
) -> tuple[Config, Params]:
    """A pre-norm decoder; `interleaved` is the rope's pairing, `head_norms` adds norms of each head of q and k."""
    metadata.refuse("expert_count", 0)
    metadata.refuse("attention.causal", True)
    heads = metadata.whole("attention.head_count")
    kv_heads = metadata.whole("attention.head_count_kv", heads)
    width = metadata.whole("embedding_length")
    head = metadata.whole("attention.key_length", width // heads, most=2**16)
    for key, ok in (("attention.head_count", heads % kv_heads == 0), ("attention.key_length", head % 2 == 0)):
        if not ok:
            raise metadata.wrong(key, metadata.get(key, head), f"a multiple of {kv_heads if 'count' in key else 2}")
    if metadata.whole("attention.value_length", head) != head:
        raise metadata.wrong("attention.value_length", metadata.get("attention.value_length"), f"key_length, {head}")
    eps = metadata.number("attention.layer_norm_rms_epsilon")
    vocab = weights.length("token_embd.weight")
    metadata.get("vocab_size", None)
    config = Config(
        layers=metadata.whole("block_count", most=len(weights)),
        width=width,
        ffn=metadata.whole("feed_forward_length"),
        vocab=vocab,
        context=metadata.whole("context_length"),
        eps=eps,
        attention=AttentionSpec(
            kv_heads=kv_heads,
            group=heads // kv_heads,
            width=head,
            scale=head**-0.5,
            rope=rope_of(metadata, weights, head, interleaved=interleaved),
            eps=eps,
        ),
        dtype=dtype,
    )
    return config, Params(
        embedding=weights("token_embd.weight", vocab, width),
        layers=weights.segments([_layer(weights, f"blk.{i}.", config, head_norms) for i in range(config.layers)]),
        norm=weights("output_norm.weight", width),
        head=weights.optional("output.weight", vocab, width),
        head_bias=weights.optional("output.bias", vocab),
    )


def rope_of(metadata: Metadata, weights: Weights, head: int, *, interleaved: bool) -> Rope:
    """The rotation that the metadata describes: plain, linear, YaRN, with or without the file's divisors."""
    width = metadata.whole("rope.dimension_count", head)
    if width > head or width % 2:
        raise metadata.wrong("rope.dimension_count", width, f"even and at most the head's width, {head}")
    base = metadata.number("rope.freq_base", 10000.0)
    divisors = weights.values("rope_freqs.weight", width // 2)
    kind = metadata.text("rope.scaling.type", "linear")
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    original = metadata.whole("rope.scaling.original_context_length", metadata.whole("context_length"))
    attn_factor = metadata.number("rope.scaling.attn_factor", 1.0)
    metadata.get("rope.scaling.finetuned", None)
    match kind:
        case "none":
            return Rope(tuple(frequencies(base, width, 1.0, divisors)), interleaved, attn_factor)
        case "linear":
            return Rope(tuple(frequencies(base, width, factor, divisors)), interleaved, attn_factor)
        case "yarn":
            if base <= 1:
                raise metadata.wrong("rope.freq_base", base, "above 1 for yarn")
            yarn = Yarn(factor, original, attn_factor)
            return Rope(tuple(yarn_frequencies(base, width, yarn, divisors)), interleaved, yarn_magnitude(yarn))
    raise metadata.wrong("rope.scaling.type", kind, "none, linear or yarn")


def _layer(weights: Weights, prefix: str, config: Config, head_norms: bool) -> LayerParams:
    d, f, spec = config.width, config.ffn, config.attention
    n, k = spec.heads * spec.width, spec.kv_heads * spec.width

    def linear(name: str, out: int, into: int) -> Linear:
        return Linear(weights(f"{prefix}{name}.weight", out, into), weights.optional(f"{prefix}{name}.bias", out))

    def norm(name: str, size: int) -> Any:
        return weights(f"{prefix}{name}.weight", size)

    q, k_, v = qkv(weights, prefix, (n, k, k), d)
    return LayerParams(
        attention_norm=norm("attn_norm", d),
        attention=AttentionParams(
            q=q,
            k=k_,
            v=v,
            o=linear("attn_output", d, n),
            q_norm=norm("attn_q_norm", spec.width) if head_norms else None,
            k_norm=norm("attn_k_norm", spec.width) if head_norms else None,
        ),
        ffn_norm=norm("ffn_norm", d),
        ffn=MlpParams(gate=linear("ffn_gate", f, d), up=linear("ffn_up", f, d), down=linear("ffn_down", d, f)),
    )


def qkv(weights: Weights, prefix: str, sizes: tuple[int, int, int], width: int) -> list[Linear]:
    """The projections to q, k and v, stored one by one or as the rows of one tensor; biases likewise."""
    names = [f"{prefix}attn_{x}" for x in "qkv"]
    fused = f"{prefix}attn_qkv"
    if f"{fused}.weight" in weights:
        w = weights.rows(f"{fused}.weight", (sum(sizes), width), sizes)
    else:
        w = [weights(f"{name}.weight", size, width) for name, size in zip(names, sizes, strict=True)]
    if f"{fused}.bias" in weights:
        b = weights.rows(f"{fused}.bias", (sum(sizes),), sizes)
    else:
        b = [weights.optional(f"{name}.bias", size) for name, size in zip(names, sizes, strict=True)]
    return [Linear(*pair) for pair in zip(w, b, strict=True)]


def init_cache(
    params: Params, batch: int, slots: int, config: Config, dtype: np.dtype
) -> tuple[tuple[KVCache, ...], ...]:
    spec = config.attention
    return tuple(
        tuple(cache.empty(s.repeats, batch, spec.kv_heads, slots, spec.width, dtype) for _ in s.layers)
        for s in params.layers
    )


def forward(
    params: Params, tokens: Int[Array, "B T"], pos: Int[Array, "B T"], cache: Any, config: Config, ops: Ops
) -> tuple[Float[Array, "B T D"], Any]:
    """x += attention(norm(x)); x += ffn(norm(x)), layer by layer. Returns (x before the last norm, cache)."""

    def layer(p: LayerParams, i: Index, x: Array, held: KVCache) -> tuple[Array, KVCache]:
        h = rms_norm(x, p.attention_norm[i], config.eps)
        h, held = attention(p.attention, i, h, pos, held, config.attention, ops)
        x = x + h
        return x + swiglu(p.ffn, i, rms_norm(x, p.ffn_norm[i], config.eps), ops), held

    x = dense(rows(params.embedding, tokens), config.dtype)
    return segments.run(params.layers, cache, x, layer)


def logits(params: Params, x: Float[Array, "B T D"], config: Config, ops: Ops) -> Float[Array, "B T V"]:
    """Scores of every token of the vocabulary, f32."""
    head = params.embedding if params.head is None else params.head
    y = ops.matmul(rms_norm(x, params.norm, config.eps), head, dtype=jnp.float32)
    return y if params.head_bias is None else y + params.head_bias.astype(jnp.float32)
