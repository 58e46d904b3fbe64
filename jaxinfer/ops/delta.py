"""The gated delta rule: linear attention whose state is corrected by what it predicts wrongly (arXiv:2412.06464).

Both forms take q and k of K heads that serve N value heads: value head n uses key head n // (N / K) where heads are
`grouped`, and n % K otherwise. A token with log_decay = 0 and beta = 0 is padding: it leaves the state bit for bit.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxinfer.ops.form import form

CHUNK = 64  # tokens whose corrections are solved for together
FEW = 8  # tokens up to which the recurrence is no slower than a whole chunk (3 ms, 16 heads of 128 on 2 cores)

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@form("token by token")
def gated_delta_reference(
    q: Float[Array, "B T K S"],
    k: Float[Array, "B T K S"],
    v: Float[Array, "B T N U"],
    log_decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    state: Float[Array, "B N S U"],
    *,
    grouped: bool,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N S U"]]:
    """The recurrence (equation 10), token by token: the definition. Returns (o, the state after the last token).

    M <- exp(log_decay) M;  M <- M + k (beta (v - k^T M))^T;  o = q^T M. The caller has normalised k and q and scaled q.
    Everything in the operands' type, f32.
    """

    def step(m: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, log_decay, beta = token  # a vector of every head as a row: [B, N, 1, width]
        m = m * jnp.exp(log_decay)
        m = m + k.swapaxes(-1, -2) * (beta * (v - _matmul(k, m)))
        return m, _matmul(q, m)

    q, k = (_to_value_heads(x, v.shape[2], grouped) for x in (q, k))
    tokens = (q, k, v, log_decay[..., None], beta[..., None])
    state, o = lax.scan(step, state, tuple(x.swapaxes(0, 1)[..., None, :] for x in tokens))
    return o[..., 0, :].swapaxes(0, 1), state


def gated_delta_chunked(
    q: Float[Array, "B T K S"],
    k: Float[Array, "B T K S"],
    v: Float[Array, "B T N U"],
    log_decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    state: Float[Array, "B N S U"],
    *,
    grouped: bool,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N S U"]]:
    """The same as matrix products over chunks of tokens (section 3.3; the WY form of arXiv:2406.06484).

    The corrections of a chunk's tokens, delta = beta (v - k^T M) each, solve one unit triangular system. All that does
    not depend on the state is computed for all chunks at once.
    """
    b, t, n, width = v.shape
    if t <= FEW:
        return gated_delta_reference(q, k, v, log_decay, beta, state, grouped=grouped)

    def split(x: Array) -> Array:  # [B, T, N, width] to [chunks, B, N, CHUNK, width], padded at the end
        x = jnp.pad(x, ((0, 0), (0, -t % CHUNK), (0, 0), (0, 0)))
        return jnp.moveaxis(x.reshape(b, -1, CHUNK, *x.shape[2:]), (1, 3), (0, 2))

    q, k = (_to_value_heads(x, n, grouped) for x in (q, k))
    q, k, v, log_decay, beta = (split(x) for x in (q, k, v, log_decay[..., None], beta[..., None]))
    # between[i, j] is the decay from token j to token i, 0 for j > i. It is summed for every pair: a difference of two
    # running sums would lose the small decays that follow a large one.
    terms = jnp.where(np.tri(CHUNK, k=-1, dtype=bool), log_decay, 0)
    between = jnp.tril(jnp.exp(jnp.cumsum(terms, axis=-2)))
    decay = jnp.exp(jnp.cumsum(log_decay, axis=-2))  # from the chunk's start
    k_t = k.swapaxes(-1, -2)
    solve = _unit_inverse(jnp.tril(beta * _matmul(k, k_t) * between, -1))
    chunks = (
        _matmul(solve, beta * v),
        _matmul(solve, beta * decay * k),
        decay * q,
        _matmul(q, k_t) * between,
        decay[..., -1:, :],
        k_t * between[..., -1:, :],
    )

    def step(m: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        v, k, q, scores, decay, k_t = chunk
        delta = v - _matmul(k, m)
        return decay * m + _matmul(k_t, delta), _matmul(q, m) + _matmul(scores, delta)

    with form(f"chunks of {CHUNK} tokens"):
        state, o = lax.scan(step, state, chunks)
    return jnp.moveaxis(o, (0, 2), (1, 3)).reshape(b, -1, n, width)[:, :t], state


def _to_value_heads(x: Float[Array, "B T K S"], heads: int, grouped: bool) -> Float[Array, "B T N S"]:
    times = heads // x.shape[2]
    return jnp.repeat(x, times, axis=2) if grouped else jnp.tile(x, (1, 1, times, 1))


def _unit_inverse(a: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """(I + a)^-1 for strictly lower triangular a, from its diagonal blocks' inverses X and Y: [[X, 0], [-Y a X, Y]].

    Blocks double from 1 to C. Entries of every block's inverse are at most 1 for keys of length 1, so that the error
    stays at a few units of f32, as a solver's does. The product of (I + (-a)^(2^m)) is shorter, but powers of `a`
    grow like binomials where keys are alike: its error in f32 reached 1e11.
    """
    block = np.arange(a.shape[-1])
    x = jnp.broadcast_to(jnp.eye(len(block), dtype=a.dtype), a.shape)
    while block.any():
        pair = block // 2
        corner = (pair[:, None] == pair) & (block[:, None] != block)
        x = x - _matmul(_matmul(x, jnp.where(corner, a, 0)), x)
        block = pair
    return x
