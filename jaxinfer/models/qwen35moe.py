"""Qwen3.5 and 3.6 with experts: the dense hybrid's layers, routed experts and a shared one with a gate."""

import numpy as np

from jaxinfer.decoder import Config, Params, forward, init_cache, logits
from jaxinfer.layers.routing import softmax_renormalised
from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.models.qwen35 import draft, draft_logits, init_draft_cache, load_hybrid
from jaxinfer.reading import moe_spec

__all__ = ["Config", "Params", "draft", "draft_logits", "forward", "init_cache", "init_draft_cache", "load", "logits"]


def load(metadata: Metadata, weights: Weights, dtype: np.dtype) -> tuple[Config, Params]:
    return load_experts(metadata, weights, dtype, grouped=False)


def load_experts(metadata: Metadata, weights: Weights, dtype: np.dtype, *, grouped: bool) -> tuple[Config, Params]:
    """The hybrid with experts; `grouped` is how value heads share key heads."""
    spec, experts, d = (
        moe_spec(metadata, softmax_renormalised),
        metadata.whole("expert_count"),
        metadata.whole("embedding_length"),
    )
    ffn, width = metadata.whole("feed_forward_length", 0, least=0), metadata.whole("expert_feed_forward_length")
    shared = metadata.whole("expert_shared_feed_forward_length", ffn)
    return load_hybrid(
        metadata,
        weights,
        dtype,
        lambda block: block.moe(experts, width, d, shared=shared, shared_gate=True),
        spec,
        grouped=grouped,
    )
