"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*batch D"], weight: Float[Array, " D"] | None, eps: float) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467, equation 4); in f32, given back in x's type."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y if weight is None else y * weight.astype(jnp.float32)).astype(x.dtype)
