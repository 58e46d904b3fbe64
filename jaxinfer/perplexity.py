"""Perplexity by llama.cpp's protocol, so that values compare digit by digit.

The tokens are cut into windows, each run on its own. The first half of a window is context only; of the second half,
every token but the first is scored. https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity

With an eviction the first half is read, evicted from, and the second half scored on what is left.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer import engine
from jaxinfer.cache import size_bytes
from jaxinfer.generate import encode
from jaxinfer.loader import Model
from jaxinfer.session import Session
from jaxinfer.snapkv import Eviction

CHUNK = 512  # tokens whose logits are there at a time: 0.5 GB of them for a vocabulary of 256k


class Estimate(NamedTuple):
    """The perplexity of all windows so far."""

    windows: int
    perplexity: float
    error: float  # of the perplexity, as the standard error of the mean; nan where there is no variance


def perplexity(
    model: Model,
    params: Any,
    ids: Sequence[int],
    *,
    bos: int | None = None,
    ctx: int = 512,
    chunk: int | None = None,
    eviction: Eviction | None = None,
) -> Iterator[Estimate]:
    """Estimates after each window of `ctx` tokens of a text; tokens after the last whole window are left out.

    `bos` takes the place of each window's first token, for models that want it. `chunk` tokens are run at a time. An
    `eviction` that keeps all of a window's first half changes nothing.
    Raises ValueError for less than two windows of tokens, and for ids that the model does not have.
    """
    if ctx < 3:
        raise ValueError(f"{ctx=} must be at least 3, so that a window has a token to score")
    chunk = min(CHUNK, ctx) if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"{chunk=} must be at least 1")
    if len(ids) < 2 * ctx:
        raise ValueError(f"the text has {len(ids)} tokens, but windows of {ctx=} tokens need at least {2 * ctx}")
    windows = np.array(encode(None, ids[: len(ids) // ctx * ctx], model.config.vocab)).reshape(-1, ctx)
    if bos is not None:
        windows[:, 0] = encode(None, [bos], model.config.vocab)
    if eviction:
        whole = jax.eval_shape(lambda: model.init_cache(params, 1, engine.slots_for(ctx), chunk=chunk))
        keep = eviction.budget(ctx, size_bytes(whole))
        eviction = replace(eviction, keep=keep) if 0 < keep < ctx // 2 else None
    return _estimates(model, params, windows, chunk, eviction)


def _estimates(
    model: Model, params: Any, windows: Int[np.ndarray, "n T"], chunk: int, eviction: Eviction | None
) -> Iterator[Estimate]:
    total, squares, count, half = 0.0, 0.0, 0, windows.shape[1] // 2
    scored = windows.shape[1] - half - 1
    for i, window in enumerate(windows.tolist(), 1):
        cache, start = None, 0
        if eviction:
            session = Session(model, params, ctx=len(window), chunk=chunk, eviction=eviction)
            session.extend([window[:half]])
            session.evict(len(window) - half)
            cache, start = session.cache, half
        tokens, pos = engine.left_pad([window[start:]], chunk)
        unscored = (tokens.shape[1] - scored - 1) // chunk
        pos = np.where(pos < 0, -1, pos + start)
        nll = np.asarray(window_nll(model, params, tokens, pos, cache, chunk=chunk, skip=unscored))
        nll = nll[-1 - scored : -1].astype(np.float64)
        total, squares, count = total + nll.sum(), squares + (nll**2).sum(), count + scored
        mean = total / count
        variance = squares / count - mean**2
        error = math.exp(mean) * math.sqrt(variance / (count - 1)) if variance > 0 and count > 1 else math.nan
        yield Estimate(i, math.exp(mean), error)


@partial(jax.jit, static_argnames=("model", "chunk", "skip"), compiler_options=engine.CUBLAS)
def window_nll(
    model: Model, params: Any, tokens: Int[Array, "1 nC"], pos: Int[Array, "1 nC"], cache: Any, *, chunk: int, skip: int
) -> Float[Array, " m"]:
    """-log p of the token after each one, f32, from the chunk `skip` on; the last value stands for nothing.

    They follow what is in the cache; None is an empty one. Logits are made a chunk at a time and stay on the device.
    """

    def forward(cache: Any, xs: tuple[Array, Array]) -> tuple[Any, Array]:
        x, cache = model.forward(params, *xs, cache)
        return cache, x

    def nll(xs: tuple[Array, Array]) -> Array:
        logits = model.logits(params, xs[0])
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, xs[1][..., None], axis=-1)[..., 0]

    def chunks(a: Array) -> Array:
        return a.reshape(-1, 1, chunk)

    if cache is None:
        cache = model.init_cache(params, 1, engine.slots_for(tokens.shape[1]), chunk=chunk)
    _, x = lax.scan(forward, cache, (chunks(tokens), chunks(pos)))  # [n, 1, C, D]
    return lax.map(nll, (x[skip:], chunks(jnp.roll(tokens, -1))[skip:])).reshape(-1)
