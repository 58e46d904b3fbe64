"""Qwen3 with experts: the chosen ones share a weight of one."""

import numpy as np

from jaxinfer.decoder import Config, Params, forward, init_cache, logits
from jaxinfer.layers.routing import softmax_renormalised
from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.reading import decoder

__all__ = ["Config", "Params", "forward", "init_cache", "load", "logits"]


def load(metadata: Metadata, weights: Weights, dtype: np.dtype) -> tuple[Config, Params]:
    return decoder(
        metadata,
        weights,
        dtype,
        interleaved=False,
        norms="head",
        routing=softmax_renormalised,
        expert_ffn=lambda ffn, used: ffn // used,
    )
