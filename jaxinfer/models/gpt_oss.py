"""gpt-oss: sinks in every attention, a window in every second, experts with biases and a clamped activation."""

from dataclasses import replace

import numpy as np

from jaxinfer.decoder import Config, LayerParams, Params, forward, init_cache, logits
from jaxinfer.layers.mlp import clamped_gate
from jaxinfer.layers.routing import softmax_of_chosen
from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.reading import Block, attention_spec, blocks, config, moe_spec, params, rope

__all__ = ["Config", "Params", "forward", "init_cache", "load", "logits"]


def load(metadata: Metadata, weights: Weights, dtype: np.dtype) -> tuple[Config, Params]:
    layers = blocks(metadata, weights)
    full = attention_spec(metadata, rope(metadata, interleaved=False))
    turn = rope(metadata, interleaved=False, suffix="_swa", base=metadata.number("rope.freq_base", 10000.0))
    window = metadata.whole("attention.sliding_window")
    sliding = attention_spec(metadata, turn, suffix="_swa", width=full.width, window=window)
    mixers = {"full": full, "sliding": sliding}
    kinds = ["sliding" if local else "full" for local in metadata.flags("attention.sliding_window_pattern", layers, 2)]
    moe = moe_spec(metadata, softmax_of_chosen, clamped_gate)
    whole = config(metadata, weights, dtype, mixers=tuple(mixers.items()), moe=moe)
    d, ffn = whole.width, metadata.whole("expert_feed_forward_length")
    metadata.get("feed_forward_length", None)  # of no layer: all have experts

    def layer(block: Block, i: int) -> LayerParams:
        mixer = block.attention(mixers[kinds[i]], d)
        return LayerParams(
            norm=block.norm("attn_norm", d),
            mixer=replace(mixer, sinks=block.norm("attn_sinks", full.heads)),
            ffn_norm=block.norm("post_attention_norm", d),
            ffn=block.moe(metadata.whole("expert_count"), ffn, d),
            kind=kinds[i],
        )

    return whole, params(weights, whole, layer)
