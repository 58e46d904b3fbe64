"""Qwen3, dense: Qwen2 without biases and with a norm of each head of q and k before the rotation."""

import numpy as np

from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.models.llama import Config, Params, forward, init_cache, load_decoder, logits

__all__ = ["Config", "Params", "forward", "init_cache", "load", "logits"]


def load(metadata: Metadata, weights: Weights, dtype: np.dtype) -> tuple[Config, Params]:
    return load_decoder(metadata, weights, dtype, interleaved=False, head_norms=True)
