"""Qwen3-Next: the first of the hybrids, whose value heads share key heads in groups of neighbours."""

import numpy as np

from jaxinfer.decoder import Config, Params, forward, init_cache, logits
from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.models.qwen35moe import load_experts

__all__ = ["Config", "Params", "forward", "init_cache", "load", "logits"]


def load(metadata: Metadata, weights: Weights, dtype: np.dtype) -> tuple[Config, Params]:
    metadata.refuse("nextn_predict_layers", 0)
    return load_experts(metadata, weights, dtype, grouped=True)
