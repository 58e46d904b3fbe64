"""OLMoE: norms over all heads of q and k together, experts weighted by the whole softmax."""

import numpy as np

from jaxinfer.decoder import Config, Params, forward, init_cache, logits
from jaxinfer.layers.routing import softmax_of_all
from jaxinfer.loader import Weights
from jaxinfer.metadata import Metadata
from jaxinfer.reading import decoder

__all__ = ["Config", "Params", "forward", "init_cache", "load", "logits"]


def load(metadata: Metadata, weights: Weights, dtype: np.dtype) -> tuple[Config, Params]:
    return decoder(metadata, weights, dtype, interleaved=False, norms="all", routing=softmax_of_all)
