"""Qwen2 and Qwen2.5: Llama's decoder with the other rope pairing; its biases are in the file."""

import numpy as np

from jaxinfer.decoder import Config, Params, forward, init_cache, logits
from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.reading import decoder

__all__ = ["Config", "Params", "forward", "init_cache", "load", "logits"]


def load(metadata: Metadata, weights: Weights, dtype: np.dtype) -> tuple[Config, Params]:
    return decoder(metadata, weights, dtype, interleaved=False)
