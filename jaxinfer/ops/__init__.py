"""The operations that a device may do in its own way, as a tuple of functions.

A model calls these and nothing else that touches a packed weight or a whole cache. `REFERENCE` is plain jnp, runs
anywhere and defines the result; to swap one operation, replace one field: `REFERENCE._replace(matmul=fused_matmul)`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinfer.cache import KVCache
from jaxinfer.ops.attention import (
    attention_ampere,
    attention_blocks,
    attention_hopper,
    attention_reference,
    attention_tiles,
)
from jaxinfer.ops.delta import gated_delta_chunked, gated_delta_reference
from jaxinfer.ops.experts import experts_gpu, experts_hopper, experts_reference
from jaxinfer.ops.matmul import matmul_gpu, matmul_hopper, matmul_reference, project_hopper, project_reference
from jaxinfer.ops.route import route_ampere, route_reference, scores_ampere, scores_reference
from jaxinfer.ops.store import store_ampere, store_reference
from jaxinfer.ops.votes import votes_hopper, votes_reference
from jaxinfer.tree import Device


class Ops(NamedTuple):
    matmul: Callable[..., Array]
    attention: Callable[..., Array]
    experts: Callable[..., Array]
    delta: Callable[..., tuple[Array, Array]]
    votes: Callable[..., Array] = votes_reference
    store: Callable[..., tuple[Array, KVCache]] = store_reference
    project: Callable[..., tuple[Array, ...]] = project_reference
    route: Callable[..., tuple[Array, Array]] = route_reference
    scores: Callable[..., tuple[Array, Array | None]] = scores_reference


REFERENCE = Ops(matmul_reference, attention_reference, experts_reference, gated_delta_reference)
CPU = Ops(matmul_reference, attention_blocks, experts_reference, gated_delta_chunked)
GPU = Ops(matmul_gpu, attention_tiles, experts_gpu, gated_delta_chunked)
AMPERE = GPU._replace(attention=attention_ampere, store=store_ampere, route=route_ampere, scores=scores_ampere)
HOPPER = Ops(
    matmul_hopper,
    attention_hopper,
    experts_hopper,
    gated_delta_chunked,
    votes_hopper,
    store_ampere,
    project_hopper,
    route_ampere,
    scores_ampere,
)
# Products that give a row the same bits among any number of others; a chunk's attention sums in another order than a
# single token's, which is left as it is.
HOPPER_INVARIANT = HOPPER._replace(
    matmul=partial(matmul_hopper, invariant=True),
    experts=partial(experts_hopper, invariant=True),
    project=partial(project_hopper, invariant=True),
)

# Activations of products with packed weights are rounded to 8 bits, a scale of a power of 2 for each 32 of them.
HOPPER_INT8 = HOPPER._replace(
    matmul=partial(matmul_hopper, narrow=True),
    experts=partial(experts_hopper, narrow=True),
    project=partial(project_hopper, narrow=True),
)


def default_ops(device: Device, dtype: np.dtype) -> Ops:
    """The fastest operations there are for activations of a type on a device."""
    if device.platform != "gpu":
        return CPU
    capability = float(device.compute_capability)
    if dtype not in (jnp.bfloat16, jnp.float16) or capability < 8:
        return GPU
    if capability < 10:
        return HOPPER if capability == 9 else AMPERE
    return AMPERE._replace(attention=partial(attention_ampere, hopper=True))
