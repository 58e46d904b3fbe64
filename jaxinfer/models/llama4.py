"""Llama 4: attention within blocks of 8192 tokens, every fourth layer over all of them and without rope."""

import numpy as np

from jaxinfer.decoder import Config, LayerParams, Params, forward, init_cache, logits
from jaxinfer.layers.routing import sigmoid_of_chosen
from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.reading import Block, attention_spec, config, moe_spec, params, rope

__all__ = ["Config", "Params", "forward", "init_cache", "load", "logits"]

BLOCK = 8192  # tokens that attend to one another in a layer with rope
WARM_UP = 0.1  # how fast a layer without rope sharpens its scores, with the logarithm of the blocks so far
LARGEST = 128  # experts of the model that has no norms of q and k


def load(metadata: Metadata, weights: Weights, dtype: np.dtype) -> tuple[Config, Params]:
    metadata.refuse("attention.sliding_window", BLOCK)
    metadata.refuse("attention.chunk_size", BLOCK)
    metadata.refuse("attention.sliding_window_pattern", 4)
    moe, experts = moe_spec(metadata, sigmoid_of_chosen, weigh_inputs=True), metadata.whole("expert_count")
    turn = rope(
        metadata,
        interleaved=True,
        divisors=lambda pairs: weights.values("rope_freqs.weight", pairs),
        base=metadata.number("rope.freq_base", 10000.0),
        suffix="_swa",
    )
    full = attention_spec(metadata, lambda head: None, warm_up=(WARM_UP, BLOCK))
    own = {"window": BLOCK, "aligned": True, "norm_rotated": experts != LARGEST}
    mixers = {"full": full, "block": attention_spec(metadata, turn, suffix="_swa", width=full.width, **own)}
    whole = config(metadata, weights, dtype, mixers=tuple(mixers.items()), moe=moe)
    d, ffn, expert_ffn = whole.width, *map(metadata.whole, ("feed_forward_length", "expert_feed_forward_length"))
    step = metadata.whole("interleave_moe_layer_step")

    def layer(block: Block, i: int) -> LayerParams:
        kind = "full" if i % 4 == 3 else "block"
        routed = i % step == step - 1
        return LayerParams(
            norm=block.norm("attn_norm", d),
            mixer=block.attention(mixers[kind], d),
            ffn_norm=block.norm("ffn_norm", d),
            ffn=block.moe(experts, expert_ffn, d, shared=expert_ffn) if routed else block.mlp(ffn, d),
            kind=kind,
        )

    return whole, params(weights, whole, layer)
