"""Rotary position embedding: every published form is one list of frequencies, worked out once at load."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Rope:
    """The rotation of one attention layer.

    `frequencies[j]` is the angle of pair j per position, in radians; twice their number of head elements are rotated
    and the rest pass. `interleaved` pairs elements (2j, 2j+1), as in Llama's files, otherwise (j, j + n/2).
    """

    frequencies: tuple[float, ...]
    interleaved: bool
    magnitude: float = 1.0


@dataclass(frozen=True)
class Yarn:
    """YaRN's context extension (arXiv:2309.00071, section 3.4), with its published ramp from 32 turns to 1."""

    factor: float
    original_context: int
    attn_factor: float = 1.0


def frequencies(base: float, width: int, factor: float = 1.0, divisors: np.ndarray | None = None) -> np.ndarray:
    """base^(-2j/width) for j < width/2, over `factor` (linear scaling) and over `divisors` (Llama 3's), in float64."""
    f = base ** (-np.arange(0, width, 2, dtype=np.float64) / width) / factor
    return f if divisors is None else f / divisors.astype(np.float64)


def yarn_frequencies(base: float, width: int, yarn: Yarn, divisors: np.ndarray | None = None) -> np.ndarray:
    """Fast pairs keep their frequency, slow ones are divided by the factor, a ramp over the pair index lies between."""

    def pair_of(turns: float) -> float:  # the pair that makes `turns` full turns over the original context
        return width * math.log(yarn.original_context / (2 * math.pi * turns)) / (2 * math.log(base))

    low = max(0, math.floor(pair_of(32.0)))
    high = min(width - 1, math.ceil(pair_of(1.0)))
    keep = 1 - np.clip((np.arange(width // 2) - low) / max(0.001, high - low), 0, 1)
    f = frequencies(base, width, divisors=divisors)
    return f * keep + f / yarn.factor * (1 - keep)


def yarn_magnitude(yarn: Yarn) -> float:
    """The factor on cos and sin that keeps attention's temperature (arXiv:2309.00071, equation 22)."""
    return yarn.attn_factor * (1 + 0.1 * math.log(max(1.0, yarn.factor)))


def rope(x: Float[Array, "B T *heads H"], pos: Int[Array, "B T"], spec: Rope) -> Float[Array, "B T *heads H"]:
    """Rotates the leading pairs of each head by its position (arXiv:2104.09864, equation 34); all in f32."""
    n = 2 * len(spec.frequencies)
    angle = pos.astype(jnp.float32)[..., None] * jnp.asarray(spec.frequencies, jnp.float32)
    angle = angle.reshape(*pos.shape, *(1,) * (x.ndim - 3), n // 2)
    cos, sin = jnp.cos(angle) * spec.magnitude, jnp.sin(angle) * spec.magnitude
    y = x[..., :n].astype(jnp.float32)
    if spec.interleaved:
        a, b = y[..., 0::2], y[..., 1::2]
        y = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(y.shape)
    else:
        a, b = jnp.split(y, 2, axis=-1)
        y = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return jnp.concatenate([y.astype(x.dtype), x[..., n:]], axis=-1)
