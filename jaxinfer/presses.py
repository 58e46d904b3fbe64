"""Presses: scores that say which keys of a cache later queries are likely to need, for evicting the others.

They differ in what they look at: the attention of the prompt's last queries (SnapKV, PyramidKV, ChunkKV, TOVA, Votes),
that of queries to come (ExpectedAttention), keys and values alone (Knorm, KeyDiff, LagKV), or positions (StreamingLLM).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.layers.rope import Rope, rope
from jaxinfer.ops.votes import attention_received, map_heads, newest, query_positions, softmax_of_seen


@dataclass(frozen=True, kw_only=True)
class Press:
    """A function (queries, k, v, pos, valid, sinks, received) -> scores of one layer.

    It is equal by value, and so a good static argument.

    queries [B, W, K, G, H]: those of the last W tokens, as attention has them: rotated, and times the layer's scale, so
        that q.k is a logit. W is `window` or more.
    k, v [B, K, S, H], pos [B, P, S]: the cache; P is 1 or K, a position < 0 marks an empty slot. Positions must ascend
        with the slots, as they do in any cache that has not wrapped: neighbours in slots are pooled together, and where
        a cache was compacted before, these are the neighbours that are left. The last token must be there.
    valid [B, W]: which queries are tokens. Those of padding, which come first, have no vote.
    sinks [N]: those of the layer's softmax, if it has any.
    received: the device's way to compute `attention_received`, of this layer's keys.

    Returns f32 [B, K, S]: larger is kept, inf always, -inf is an empty slot. Where several layers read one cache, the
    sum of their scores is the cache's. Everything is computed in f32.
    """

    window: int = 0  # queries that it looks at

    def __call__(
        self,
        queries: Float[Array, "B W K G H"],
        k: Float[Array, "B K S H"],
        v: Float[Array, "B K S H"],
        pos: Int[Array, "B P S"],
        valid: Bool[Array, "B W"],
        sinks: Float[Array, " N"] | None = None,
        received: Callable[..., Array] = attention_received,
    ) -> Float[Array, "B K S"]:
        raise NotImplementedError

    def budgets(self, keep: float | int, tokens: int, layers: int) -> tuple[int, ...]:
        """How many of a prompt's tokens each of the layers keeps, where `keep` is their mean."""
        return (round(keep),) * layers


@dataclass(frozen=True, kw_only=True)
class Votes(Press):
    """The attention that a key gets, summed over the window and the group. Nothing is pinned; see `one_list`."""

    window: int = 64

    def __call__(self, queries, k, v, pos, valid, sinks=None, received=attention_received):
        votes = received(*_last(self.window, queries, valid), k, pos, sinks)
        return _mark(votes.sum(2), pos, pinned=False)


@dataclass(frozen=True, kw_only=True)
class SnapKV(Press):
    """The mean attention that a key gets from the window, pooled over neighbours (arXiv:2404.14469).

    Mean over the group, one list per KV head. Only keys before the window are scored and pooled; the window is pinned.
    An average is over `kernel` slots even at the ends, where those outside count as zeros.
    """

    window: int = 64
    kernel: int = 5
    pooling: Literal["average", "max"] = "average"

    def __post_init__(self):
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"window={self.window} must be at least 1, and kernel={self.kernel} odd")

    def __call__(self, queries, k, v, pos, valid, sinks=None, received=attention_received):
        votes = received(*_last(self.window, queries, valid), k, pos, sinks) / self.window
        before = pos <= newest(pos) - self.window
        votes = jnp.where(before[:, :, None], votes, 0)
        if self.pooling == "max":
            pooled = _pool(votes, self.kernel, -jnp.inf, lax.max)
        else:
            pooled = _pool(votes, self.kernel, 0.0, lax.add) / self.kernel
        return _mark(pooled.mean(2), pos, ~before)


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV with budgets that fall from layer to layer (arXiv:2406.02069)."""

    beta: int = 20

    def budgets(self, keep: float | int, tokens: int, layers: int) -> tuple[int, ...]:
        """A straight line from 2 keep - keep / beta to keep / beta, no more than the tokens before the window.

        Flat where the last layer's end would be below the window.
        """
        least = keep / self.beta
        most = 2 * keep - least
        if most >= tokens - self.window:
            most = tokens - self.window
            least = 2 * keep - most
        if not tokens >= most >= least >= self.window:
            return super().budgets(keep, tokens, layers)
        step = (most - least) / max(layers - 1, 1)
        return tuple(round(most - layer * step) for layer in range(layers))


@dataclass(frozen=True, kw_only=True)
class ChunkKV(SnapKV):
    """SnapKV's scores summed over the heads, and their mean over each `chunk` slots (arXiv:2502.00299).

    One list for all heads. A pinned key counts as one more than the largest score. A budget that is no whole number of
    chunks cuts the worst one.
    """

    chunk: int = 20

    def __call__(self, queries, k, v, pos, valid, sinks=None, received=attention_received):
        scores = super().__call__(queries, k, v, pos, valid, sinks, received)
        pin = jnp.where(jnp.isfinite(scores), scores, 0).max((1, 2), keepdims=True) + 1
        scores = jnp.where(pos < 0, 0, jnp.minimum(scores, pin)).sum(1)
        sums, counts = (
            jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.chunk))).reshape(len(x), -1, self.chunk).sum(2)
            for x in (scores, (pos >= 0).any(1).astype(jnp.float32))
        )
        means = jnp.repeat(sums / jnp.maximum(counts, 1), self.chunk, axis=1)[:, None, : k.shape[2]]
        return _mark(jnp.broadcast_to(means, k.shape[:3]), pos, pinned=False)


@dataclass(frozen=True, kw_only=True)
class TOVA(Press):
    """The attention of the last query, mean over all heads (arXiv:2401.06104); it pins its own key."""

    window: int = 1

    def __call__(self, queries, k, v, pos, valid, sinks=None, received=attention_received):
        votes = received(*_last(1, queries, valid), k, pos, sinks).mean((1, 2))
        return _mark(jnp.broadcast_to(votes[:, None], k.shape[:3]), pos, pos == newest(pos))


@dataclass(frozen=True, kw_only=True)
class Knorm(Press):
    """Short keys are kept: they get the most attention (arXiv:2406.11430)."""

    def __call__(self, queries, k, v, pos, valid, sinks=None, received=attention_received):
        return _mark(-jnp.linalg.norm(k.astype(jnp.float32), axis=-1), pos, pinned=False)


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Press):
    """Keys unlike the others are kept: minus the cosine to their mean direction (arXiv:2504.15364)."""

    def __call__(self, queries, k, v, pos, valid, sinks=None, received=attention_received):
        unit = _unit(k.astype(jnp.float32))
        mean = _unit(jnp.where((pos >= 0)[..., None], unit, 0).sum(2, keepdims=True))  # of any length: only it counts
        return _mark(-(unit * mean).sum(-1), pos, pinned=False)


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Press):
    """The first tokens, and the most recent (arXiv:2309.17453)."""

    first: int = 4

    def __call__(self, queries, k, v, pos, valid, sinks=None, received=attention_received):
        return _mark(jnp.broadcast_to(pos, k.shape[:3]).astype(jnp.float32), pos, pos < self.first)


@dataclass(frozen=True, kw_only=True)
class LagKV(Press):
    """Tokens that vary most over the channels, each within the span of the partition after its own (arXiv:2504.04704).

    A score is the rank within a partition of `lag` tokens, over lag. Pinned are the first tokens, the last whole
    partition and what follows it. The cache must not have been compacted: its slots are positions.
    """

    lag: int = 128
    first: int = 4

    def __call__(self, queries, k, v, pos, valid, sinks=None, received=attention_received):
        parts = max((k.shape[2] - self.first) // self.lag, 0)

        def variation(x: Array) -> Array:  # of all partitions but the last, [B, K, parts - 1, lag]
            x = x[:, :, self.first : self.first + parts * self.lag].astype(jnp.float32)
            x = x.reshape(*x.shape[:2], parts, self.lag, x.shape[3])
            low, high = x[:, :, 1:].min(3, keepdims=True), x[:, :, 1:].max(3, keepdims=True)
            span = jnp.where(high > low, high - low, 1)
            return jax.nn.softmax(((x[:, :, :-1] - low) / span).std(-1, ddof=1))

        ranks = jnp.argsort(jnp.argsort(variation(k) + variation(v))).astype(jnp.float32) / self.lag
        ranks = jnp.pad(ranks.reshape(*k.shape[:2], -1), ((0, 0), (0, 0), (self.first, k.shape[2])))
        whole = (newest(pos) + 1 - self.first) // self.lag
        ranked = (pos >= self.first) & ((pos - self.first) // self.lag < whole - 1)
        return _mark(ranks[..., : k.shape[2]], pos, ~ranked)


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Press):
    """The attention that Gaussian queries at the next `future` positions pay, times the value's length.

    Their mean and covariance are those of the window's queries before rotation, without the first tokens' (kvpress
    takes all of the prompt; arXiv:2510.00636). The first tokens are pinned. `rope` is the layers' rotation.
    """

    rope: Rope | None
    window: int = 512
    future: int = 512
    first: int = 4

    def __call__(self, queries, k, v, pos, valid, sinks=None, received=attention_received):
        queries, valid = _last(self.window, queries, valid)
        at = query_positions(queries, pos)
        if self.rope is not None:
            queries = rope(queries, -at, replace(self.rope, magnitude=1 / self.rope.magnitude))
        mean, covariance = query_statistics(queries, valid & (at >= self.first))
        if self.rope is not None:
            turn = mean_rotation(self.rope, k.shape[3], newest(pos)[:, 0, 0] + 1, self.future)
            mean, covariance = turn_statistics(mean, covariance, turn)
        return expected_scores(mean, covariance, k, v, pos, sinks, first=self.first)


PRESSES: dict[str, type[Press]] = {
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "chunkkv": ChunkKV,
    "votes": Votes,
    "tova": TOVA,
    "expected": ExpectedAttention,
    "knorm": Knorm,
    "keydiff": KeyDiff,
    "streaming": StreamingLLM,
    "lagkv": LagKV,
}


def press(name: str, rope: Rope | None, window: int | None = None, kernel: int | None = None) -> Press:
    """The press of a name, for layers with this rotation; `window` and `kernel` where it has them to be set."""
    kind = PRESSES[name]
    options: dict[str, Any] = {name: n for name, n in (("window", window), ("kernel", kernel)) if n is not None}
    if window is not None and (kind.window == 0 or kind is TOVA):
        raise ValueError(f"{window=}: the press {name!r} looks at {kind.window} queries always")
    if kernel is not None and not issubclass(kind, SnapKV):
        raise ValueError(f"{kernel=}: the press {name!r} pools nothing")
    return kind(**options, rope=rope) if kind is ExpectedAttention else kind(**options)


def one_list(scores: Float[Array, "L B K S"], pos: Int[Array, "B 1 S"], *, recent: int) -> Float[Array, "B 1 S"]:
    """Scores of one list for all heads and layers: their sum, with the last `recent` positions pinned."""
    return _mark(scores.sum((0, 2))[:, None], pos, pos > newest(pos) - recent)


def query_statistics(
    queries: Float[Array, "B T K G H"], valid: Bool[Array, "B T"]
) -> tuple[Float[Array, "B K G H"], Float[Array, "B K G H H"]]:
    """Mean and covariance (over their number, not one less) of each head's valid queries, in f32."""
    weight = valid / jnp.maximum(valid.sum(1, keepdims=True), 1)
    q = queries.astype(jnp.float32)
    mean = jnp.einsum("bt,btkgh->bkgh", weight, q, precision=lax.Precision.HIGHEST)
    q = q - mean[:, None]
    return mean, jnp.einsum("bt,btkgi,btkgj->bkgij", weight, q, q, precision=lax.Precision.HIGHEST)


def mean_rotation(spec: Rope, width: int, start: Int[Array, " B"], count: int) -> Float[Array, "B H H"]:
    """The mean of the rotations of `count` positions from `start` on, as a matrix to multiply from the left."""
    basis = jnp.broadcast_to(jnp.eye(width), (1, count, width, width))
    return lax.map(lambda first: rope(basis, (first + jnp.arange(count))[None], spec)[0].mean(0).T, start)


def turn_statistics(
    mean: Float[Array, "B K G H"], covariance: Float[Array, "B K G H H"], turn: Float[Array, "B H H"]
) -> tuple[Float[Array, "B K G H"], Float[Array, "B K G H H"]]:
    """Mean and covariance of turn @ q."""
    turn = turn[:, None, None]
    product = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)  # noqa: E731
    return product(turn, mean[..., None])[..., 0], product(product(turn, covariance), turn.swapaxes(-1, -2))


def expected_scores(
    mean: Float[Array, "B K G H"],
    covariance: Float[Array, "B K G H H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    pos: Int[Array, "B P S"],
    sinks: Float[Array, " N"] | None = None,
    *,
    first: int,
) -> Float[Array, "B K S"]:
    """softmax(log E[exp(q.k)]) |v| for queries q of this distribution, mean over the group; `first` tokens are pinned.

    The expectation's logarithm is mean.k + k' covariance k / 2. The softmax is over all keys but the pinned ones.
    """
    seen = pos >= first

    def one_head(head: tuple) -> Array:
        mean, covariance, k, v, seen, sink = head
        k, v = _f32(k, v)
        product = lambda form, *x: jnp.einsum(form, *x, precision=lax.Precision.HIGHEST)  # noqa: E731
        half = product("bsi,bgij->bgsj", k, covariance)
        s = product("bsh,bgh->bgs", k, mean) + (half * k[:, None]).sum(-1) / 2
        weights = softmax_of_seen(s, seen[:, None], sink)
        return weights.mean(1) * jnp.linalg.norm(v, axis=-1)

    heads = (mean, covariance, k, v, jnp.broadcast_to(seen, k.shape[:3]))
    return _mark(map_heads(one_head, heads, sinks), pos, ~seen)


def _mark(scores: Float[Array, "B K S"], pos: Int[Array, "B P S"], pinned: Array | bool) -> Float[Array, "B K S"]:
    return jnp.where(pos < 0, -jnp.inf, jnp.where(pinned, jnp.inf, scores))


def _last(window: int, queries: Array, valid: Array) -> tuple[Array, Array]:
    if queries.shape[1] < window:
        raise ValueError(f"{queries.shape[1]} queries for a window of {window}")
    return queries[:, -window:], valid[:, -window:]


def _pool(x: Float[Array, "B K G S"], kernel: int, start: float, fold: Callable) -> Float[Array, "B K G S"]:
    return lax.reduce_window(x, start, fold, (1, 1, 1, kernel), (1, 1, 1, 1), "SAME")


def _unit(x: Float[Array, "*n H"]) -> Float[Array, "*n H"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _f32(*arrays: Array) -> list[Array]:
    return [x.astype(jnp.float32) for x in arrays]
