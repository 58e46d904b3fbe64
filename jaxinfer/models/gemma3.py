"""Gemma 3: norms before and after each half of a layer, and windows on most layers."""

import numpy as np

from jaxinfer.decoder import Config, LayerParams, Params, forward, init_cache, logits
from jaxinfer.layers.mlp import gelu_gate
from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.reading import Block, attention_spec, blocks, config, params, rope

__all__ = ["Config", "Params", "forward", "init_cache", "load", "logits"]

LARGEST = 62  # layers of the model with 27B parameters, which scales scores in its own way


def load(metadata: Metadata, weights: Weights, dtype: np.dtype) -> tuple[Config, Params]:
    layers, d = blocks(metadata, weights), metadata.whole("embedding_length")
    for key in ("expert_count", "attn_logit_softcapping"):
        metadata.refuse(key, 0)
    own = {"scale": (d // metadata.whole("attention.head_count")) ** -0.5} if layers == LARGEST else {}
    full = attention_spec(metadata, rope(metadata, interleaved=False), **own)
    mixers, sliding = {"full": full}, (False,) * layers
    window = metadata.whole("attention.sliding_window", 0, least=0)
    if window:
        turn = rope(metadata, interleaved=False, suffix="_swa", scaled=False)
        mixers["sliding"] = attention_spec(metadata, turn, suffix="_swa", width=full.width, window=window, **own)
        sliding = metadata.flags("attention.sliding_window_pattern", layers, 6)
    kinds = ["sliding" if local else "full" for local in sliding]
    softcap = metadata.get("final_logit_softcapping", None)
    whole = config(
        metadata,
        weights,
        dtype,
        mixers=tuple((kind, mixers[kind]) for kind in sorted(set(kinds))),
        activation=gelu_gate,
        embedding_scale=d**0.5,
        softcap=None if softcap is None else metadata.number("final_logit_softcapping"),
    )
    ffn = metadata.whole("feed_forward_length")

    def layer(block: Block, i: int) -> LayerParams:
        return LayerParams(
            norm=block.norm("attn_norm", d),
            mixer=block.attention(mixers[kinds[i]], d, norms="head"),
            post_norm=block.norm("post_attention_norm", d),
            ffn_norm=block.norm("ffn_norm", d),
            ffn=block.mlp(ffn, d),
            ffn_post_norm=block.norm("post_ffw_norm", d),
            kind=kinds[i],
        )

    return whole, params(weights, whole, layer)
