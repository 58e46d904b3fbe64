"""Qwen3, dense: Qwen2 without biases and with a norm of each head of q and k before the rotation."""

import numpy as np

from jaxinfer.decoder import Config, Params, forward, init_cache, logits
from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.reading import decoder

__all__ = ["Config", "Params", "forward", "init_cache", "load", "logits"]


def load(metadata: Metadata, weights: Weights, dtype: np.dtype) -> tuple[Config, Params]:
    return decoder(metadata, weights, dtype, interleaved=False, norms="head")
