"""Qwen3.5 and 3.6, dense: three gated delta nets to one gated attention; and the block that drafts a second token."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.decoder import Config, LayerParams, Params, embed, forward, head, init_cache, layer, logits
from jaxinfer.layers.delta import DeltaParams, DeltaSpec
from jaxinfer.layers.linear import Linear, linear
from jaxinfer.layers.mlp import MlpParams
from jaxinfer.layers.moe import MoeParams, MoeSpec
from jaxinfer.layers.norm import rms_norm
from jaxinfer.layers.rope import Rope
from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.ops import Ops
from jaxinfer.quants import Weight
from jaxinfer.reading import Block, attention_spec, blocks, config, params, rope
from jaxinfer.segments import Layers
from jaxinfer.tree import pytree

__all__ = ["Config", "Params", "draft", "draft_logits", "forward", "init_cache", "init_draft_cache", "load", "logits"]


@pytree
class DraftParams:
    """The multi-token-prediction block: a layer of its own over a token's embedding and the hidden state before it."""

    embedding_norm: Array  # [D]
    hidden_norm: Array  # [D]
    join: Linear  # [D, 2D]
    layers: Layers  # one
    norm: Array | None  # [D]; None: the model's last norm
    embedding: Weight | None  # [V, D]; None: the model's
    head: Weight | None  # [V, D]; None: the model's


def load(metadata: Metadata, weights: Weights, dtype: np.dtype) -> tuple[Config, Params]:
    metadata.refuse("expert_count", 0)
    ffn, d = metadata.whole("feed_forward_length"), metadata.whole("embedding_length")
    return load_hybrid(metadata, weights, dtype, lambda block: block.mlp(ffn, d))


def load_hybrid(
    metadata: Metadata,
    weights: Weights,
    dtype: np.dtype,
    feed_forward: Callable[[Block], MlpParams | MoeParams],
    moe: MoeSpec | None = None,
    *,
    grouped: bool = False,
) -> tuple[Config, Params]:
    """A hybrid whose feed-forward layers `feed_forward` reads; `grouped` is how value heads share key heads."""
    count, drafts = blocks(metadata, weights), metadata.whole("nextn_predict_layers", 0, least=0, most=1)
    if drafts >= count:
        raise metadata.wrong("nextn_predict_layers", drafts, f"below block_count, {count}")
    turn = rope(metadata, interleaved=False)
    full = attention_spec(metadata, lambda head: _of_text(metadata, turn(head)), gated=True)
    delta = delta_spec(metadata, grouped=grouped)
    recurrent = metadata.flags("full_attention_interval", count, 4)
    recurrent = metadata.flags("attention.recurrent_layers", count, np.array(recurrent))
    whole = config(metadata, weights, dtype, drafts=drafts, mixers=(("delta", delta), ("full", full)), moe=moe)
    d = whole.width

    def read(block: Block, i: int) -> LayerParams:
        linear_attention = recurrent[i] and i < whole.layers
        return LayerParams(
            norm=block.norm("attn_norm", d),
            mixer=delta_params(block, delta, d) if linear_attention else block.attention(full, d, norms="head"),
            ffn_norm=block.norm("post_attention_norm", d),
            ffn=feed_forward(block),
            kind="delta" if linear_attention else "full",
        )

    return whole, params(weights, whole, read, draft=_draft(weights, whole, read) if drafts else None)


def _of_text(metadata: Metadata, turn: Rope) -> Rope:
    """The rotation of text. The file divides its pairs among an image's time, height and width, and a fourth position.

    For text the first three are the token's position and the fourth is 0: its pairs stand still.
    """
    key = "rope.dimension_sections"
    sections = metadata.get(key, None)
    if sections is None:
        return turn
    if not isinstance(sections, np.ndarray) or sections.shape != (4,) or sections.dtype.kind not in "iu":
        raise metadata.wrong(key, sections, "four whole numbers")
    parts = sections.tolist()
    total = sum(parts)
    if min(parts) < 0 or total < 1:
        raise metadata.wrong(key, sections, "four whole numbers from 0 on, not all of them 0")
    moves = (pair % total < 3 * parts[pair % total % 3] for pair in range(len(turn.frequencies)))
    return replace(turn, frequencies=tuple(f if m else 0.0 for f, m in zip(turn.frequencies, moves, strict=True)))


def delta_spec(metadata: Metadata, *, grouped: bool) -> DeltaSpec:
    width, keys, values = (metadata.whole(f"ssm.{k}") for k in ("state_size", "group_count", "time_step_rank"))
    if values % keys:
        raise metadata.wrong("ssm.time_step_rank", values, f"a multiple of ssm.group_count, {keys}")
    if metadata.whole("ssm.inner_size") != values * width:
        raise metadata.wrong("ssm.inner_size", metadata.get("ssm.inner_size"), "time_step_rank * state_size")
    return DeltaSpec(
        key_heads=keys,
        value_heads=values,
        width=width,
        kernel=metadata.whole("ssm.conv_kernel", least=2),
        grouped=grouped,
        eps=metadata.number("attention.layer_norm_rms_epsilon"),
    )


def delta_params(block: Block, spec: DeltaSpec, width: int) -> DeltaParams:
    """The tensors of a delta layer. Qwen3-Next has the two gates' projections in one."""
    keys, values = spec.key_heads * spec.width, spec.value_heads * spec.width
    n = spec.value_heads
    both = "ssm_ba" in block
    return DeltaParams(
        qkv=block.linear("attn_qkv", 2 * keys + values, width),
        z=block.linear("attn_gate", values, width),
        conv=block.weights(f"{block.prefix}ssm_conv1d.weight", 2 * keys + values, spec.kernel),
        a=block.weights(f"{block.prefix}ssm_a", n),
        dt_bias=block.weights(f"{block.prefix}ssm_dt.bias", n),
        beta=block.linear("ssm_ba", 2 * n, width) if both else block.linear("ssm_beta", n, width),
        alpha=None if both else block.linear("ssm_alpha", n, width),
        norm=block.norm("ssm_norm", spec.width),
        out=block.linear("ssm_out", width, values),
    )


def _draft(weights: Weights, config: Config, read: Callable[[Block, int], LayerParams]) -> DraftParams:
    d, block = config.width, Block(weights, f"blk.{config.layers}.")
    return DraftParams(
        embedding_norm=block.norm("nextn.enorm", d),
        hidden_norm=block.norm("nextn.hnorm", d),
        join=block.linear("nextn.eh_proj", d, 2 * d),
        layers=weights.layers([read(block, config.layers)]),
        norm=weights.optional(f"{block.prefix}nextn.shared_head_norm.weight", d),
        embedding=weights.optional(f"{block.prefix}nextn.embed_tokens.weight", config.vocab, d),
        head=weights.optional(f"{block.prefix}nextn.shared_head_head.weight", config.vocab, d),
    )


def init_draft_cache(params: Params, batch: int, slots: int, chunk: int, config: Config, dtype: np.dtype) -> Any:
    return config.mixer("full").cache(1, batch, slots, chunk, dtype)


def draft(
    params: Params,
    tokens: Int[Array, "B T"],
    hidden: Float[Array, "B T D"],
    pos: Int[Array, "B T"],
    cache: Any,
    config: Config,
    ops: Ops,
) -> tuple[Float[Array, "B T D"], Any]:
    """The draft block on tokens and the hidden states of the tokens before them (zeros before the first).

    `hidden` is the output of the model's last norm, or what this function returned for the token before. Returns
    (hidden, cache); `draft_logits` of hidden are the scores of the token after the next (DeepSeek-V3, arXiv:2412.19437,
    section 2.2).
    """
    p: DraftParams = params.draft
    x = embed(params.embedding if p.embedding is None else p.embedding, tokens, config)
    x = rms_norm(x, p.embedding_norm, config.eps)
    y = jnp.concatenate([x, rms_norm(hidden.astype(x.dtype), p.hidden_norm, config.eps)], axis=-1)
    y, cache = layer(p.layers.stacks[0], 0, linear(p.join, None, y, ops), pos, cache, config, ops)
    return rms_norm(y, params.norm if p.norm is None else p.norm, config.eps), cache


def draft_logits(params: Params, hidden: Float[Array, "B T D"], config: Config, ops: Ops) -> Float[Array, "B T V"]:
    """Scores from what `draft` returned, f32."""
    own = params if params.draft.head is None else replace(params, head=params.draft.head)
    return head(own, hidden, config, ops)
