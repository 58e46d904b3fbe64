"""The two compiled programs, and the layout of prompts for them.

`prefill` runs prompts through the model into a cache, chunk by chunk; `decode` samples from there in one loop.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxinfer.loader import Model
from jaxinfer.programs import program
from jaxinfer.sample import Sampler
from jaxinfer.tree import pytree

# In a prefill of 2048 rows on an H200 cuBLAS's products are an eighth faster than the Triton ones that XLA prefers.
CUBLAS = {"xla_gpu_enable_triton_gemm": False}
SLOTS = 256  # caches are allocated in multiples of this, so that few shapes are compiled
CHUNKS = 4  # chunks that one call of prefill takes, while there are so many; what is left goes one by one


@program(static_argnames=("model", "chunk"), donate_argnames="cache", compiler_options=CUBLAS)
def prefill(
    model: Model, params: Any, tokens: Int[Array, "B nC"], pos: Int[Array, "B nC"], cache: Any, *, chunk: int
) -> tuple[Float[Array, "B V"], Any]:
    """Runs tokens at their positions (below zero: padding) through the model, `chunk` at a time.

    Returns (logits of the last token, f32 [B, V]; cache). The cache is donated. Prompts are padded on the left, see
    `left_pad`, so that the last token is the last of the last chunk.
    """

    def step(cache: Any, xs: tuple[Array, Array]) -> tuple[Any, Array]:
        x, cache = model.forward(params, *xs, cache)
        return cache, x[:, -1]

    chunks = tuple(a.reshape(a.shape[0], -1, chunk).swapaxes(0, 1) for a in (tokens, pos))  # [n, B, C]
    cache, last = lax.scan(step, cache, (chunks[0], chunks[1]))
    return model.logits(params, last[-1][:, None])[:, 0], cache


@program(static_argnames=("model",), donate_argnames="cache", compiler_options=CUBLAS)
def chunk_logits(
    model: Model, params: Any, tokens: Int[Array, "B C"], pos: Int[Array, "B C"], cache: Any
) -> tuple[Float[Array, "B C V"], Any]:
    """One chunk of a prefill, with the logits of every position, f32. The cache is donated."""
    x, cache = model.forward(params, tokens, pos, cache)
    return model.logits(params, x), cache


@pytree
class State:
    """All that decoding carries from token to token."""

    logits: Float[Array, "B V"]  # for each row's next token
    pos: Int[Array, " B"]  # where that token goes
    cache: Any
    history: Int[Array, "B P"]  # each row's last tokens, -1 where there are none: what penalties look at
    done: Bool[Array, " B"]


@program(static_argnames=("model", "sampler", "room"), donate_argnames="state")
def decode(
    model: Model,
    params: Any,
    state: State,
    keys: Key[Array, " B"],
    stops: Int[Array, " E"],
    limit: Int[Array, ""] | int,
    *,
    sampler: Sampler,
    room: int,
) -> tuple[Int[Array, "B room"], State]:
    """Samples up to `limit` (at most `room`) tokens a row, until every row has come to one of the tokens `stops`.

    Returns (tokens [B, room], the stop included and -1 after it; state). The state is donated. A draw depends on its
    row's key and position alone, so it makes no difference where a run is cut into calls.
    """

    def going(carry: tuple[Array, Array, State]) -> Array:
        i, _, s = carry
        return (i < jnp.minimum(limit, room)) & ~s.done.all()

    def step(carry: tuple[Array, Array, State]) -> tuple[Array, Array, State]:
        i, out, s = carry
        token = sampler(jax.vmap(jax.random.fold_in)(keys, s.pos), s.logits, s.history)
        out = out.at[:, i].set(jnp.where(s.done, -1, token))
        history = jnp.concatenate([s.history, token[:, None]], axis=1)[:, 1:]
        # A row that has ended is padding from here on: nothing of it is stored.
        x, cache = model.forward(params, token[:, None], jnp.where(s.done, -1, s.pos)[:, None], s.cache)
        logits = jnp.where(s.done[:, None], s.logits, model.logits(params, x)[:, 0])
        done = s.done | (token[:, None] == stops).any(axis=1)
        return i + 1, out, State(logits, s.pos + 1, cache, history, done)

    out = jnp.full((keys.shape[0], room), -1, jnp.int32)
    _, out, state = lax.while_loop(going, step, (jnp.int32(0), out, state))
    return out, state


def slots_for(tokens: int) -> int:
    """Slots of a cache that is to hold so many tokens."""
    return -(-tokens // SLOTS) * SLOTS


def chunk_for(tokens: int, chunk: int) -> int:
    """A short prompt takes a short chunk; powers of two keep the number of compiled shapes low."""
    return min(chunk, max(16, 1 << (tokens - 1).bit_length()))


def left_pad(prompts: Sequence[Sequence[int]], chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Lays prompts side by side, ending together: (tokens, positions), int32 [B, nC]; padding has the position -1."""
    width = -(-max(map(len, prompts)) // chunk) * chunk
    tokens, pos = np.zeros((len(prompts), width), np.int32), np.full((len(prompts), width), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        pos[row, width - len(prompt) :] = np.arange(len(prompt))
    return tokens, pos


def calls(
    tokens: np.ndarray, pos: np.ndarray, chunk: int, together: int = CHUNKS
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts padded prompts into the calls of `prefill` to make: few shapes, and a place to stop between any two."""
    start = 0
    while (left := (tokens.shape[1] - start) // chunk) > 0:
        end = start + chunk * (together if left >= together else 1)
        yield tokens[:, start:end], pos[:, start:end]
        start = end


def start(logits: Float[Array, "B V"], prompts: Sequence[Sequence[int]], cache: Any, sampler: Sampler) -> State:
    """The state in which decoding follows a prefill of `prompts`."""
    history = np.full((len(prompts), sampler.window), -1, np.int32)
    for row, prompt in enumerate(prompts):
        last = list(prompt)[-sampler.window :] if sampler.window else []
        history[row, sampler.window - len(last) :] = last
    pos = np.array([len(p) for p in prompts], np.int32)
    return State(logits, jnp.asarray(pos), cache, jnp.asarray(history), jnp.zeros(len(prompts), bool))
