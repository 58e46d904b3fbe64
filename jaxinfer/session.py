"""A session: what a model has read, as a value that is continued, forked, cut back, evicted from and saved."""

import copy
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jaxinfer import archive, engine, snapkv
from jaxinfer.cache import KVCache, is_full, size_bytes
from jaxinfer.loader import Model
from jaxinfer.programs import Prepare
from jaxinfer.sample import Sampler
from jaxinfer.snapkv import Eviction

type Progress = Callable[[int, int], None]


class Session:
    """Rows of tokens with their caches, and the logits of what comes next.

    Its methods put new arrays in the place of the old, which they use up: to keep a state, `fork` it.

    tokens: those of each row that were read.
    cache, logits: what the model made of them; logits f32 [B, V], None before the first token and after a cut.
    kept: the lists of the last eviction, as in `snapkv.Evicted`.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        *,
        ctx: int,
        chunk: int,
        batch: int = 1,
        eviction: Eviction | None = None,
        dtype: DTypeLike | None = None,
    ):
        """An empty session for `batch` rows of up to `ctx` tokens, read at most `chunk` at a time.

        With an `eviction` it keeps what `evict` needs; if that is interleaved, there are slots for the tokens kept and
        a chunk alone. Keys and values have the activations' type unless `dtype` is given.
        """
        for name, value in (("ctx", ctx), ("chunk", chunk), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.model, self.params, self.ctx, self.chunk = model, params, ctx, chunk
        self.eviction, self.dtype = eviction, dtype
        self._settle(batch)
        self._begin(batch)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all but the mark to a safetensors file; one of that name stays whole until this one is.

        Raises ValueError where the caches were lost or the file cannot be written.
        """
        self._check_caches()
        held = archive.Saved(
            ctx=self.ctx,
            chunk=self.chunk,
            dtype=jnp.dtype(self.dtype or self.model.config.dtype),
            evicted=self._evicted,
            tokens=self.tokens,
            room=self._room,
            observed=self._observed,
            logits=self.logits,
            cache=self.cache,
            kept=self.kept,
            places=list(self.params.layers.places()),
        )
        archive.save(path, self.model, held)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Model, params: Any, *, eviction: Eviction | None = None
    ) -> "Session":
        """The session that `save` wrote, which goes on to the same bits if it is given the same eviction.

        Raises ValueError, before the device has anything of it, for a file that is not a whole session of this model,
        or whose caches an interleaved eviction cannot go on with.
        """
        held = archive.load(path, model, params)
        out = cls.__new__(cls)
        out.model, out.params, out.ctx, out.chunk = model, params, held.ctx, held.chunk
        out.eviction, out.dtype, out.tokens = eviction, held.dtype, held.tokens
        out._settle(len(held.tokens))
        if out._interleaved and not out.evicting:
            has, needs = _slots(held.cache), _slots(jax.eval_shape(lambda: out._empty(len(held.tokens))))
            if any(one < other for one, other in zip(has, needs, strict=True)):
                raise ValueError(f"{path}: its caches have {min(has)} slots, but keep={out.keep} needs {max(needs)}")
        out.logits, out.cache, out.kept = jax.tree.map(jnp.array, (held.logits, held.cache, held.kept))
        out._room, out._observed, out._evicted, out._mark = held.room, held.observed, held.evicted, None
        return out

    def _settle(self, batch: int) -> None:
        self.keep = 0  # tokens that the eviction keeps; 0 for all
        if self.eviction:
            self.keep = self.eviction.budget(self.ctx, size_bytes(jax.eval_shape(lambda: self._empty(batch))))

    def _begin(self, batch: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.logits: Float[Array, "B V"] | None = None
        self.cache: Any = None  # the old one goes before the new one comes
        self.cache = self._empty(batch)
        self.kept: Any = None
        self._room = [min([self.ctx, *_slots(self.cache)])] * batch  # tokens that a row can still get
        self._observed = [0] * batch  # tokens at a row's end whose queries are in the cache
        self._evicted = 0  # tokens that were there at the last eviction
        self._mark: tuple[int, Array, Any] | None = None

    def _empty(self, batch: int) -> Any:
        def make() -> Any:
            observe = self.eviction.press.window if self.eviction and self.keep else 0
            slots = engine.slots_for(self.ctx)
            options = {"chunk": self.chunk, "dtype": self.dtype, "observe": observe}
            return self.model.init_cache(self.params, batch, slots, **options)

        if not (self.eviction and self.eviction.interleaved and self.keep):
            return make()
        sizes = [self.ctx] * batch  # the shape that it has between two chunks, from the start
        evict = partial(
            snapkv.evict, self.params, eviction=self.eviction, keep=self.keep, tokens=sizes, room=self.chunk
        )
        return jax.tree.map(_blank, jax.eval_shape(lambda: evict(cache=make())).cache, is_leaf=_is_cache)

    @property
    def evicting(self) -> bool:
        """Whether there is more than `evict` would keep."""
        return 0 < self.keep < max(map(len, self.tokens))

    def calls(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The calls of `prefill` in which these tokens are read after those of each row."""
        chunk = engine.chunk_for(max(map(len, rows)), self.chunk)
        tokens, pos = engine.left_pad(rows, chunk)
        start = np.array([[len(row)] for row in self.tokens], np.int32)
        alone = self.eviction is not None and self.eviction.interleaved
        return engine.calls(tokens, np.where(pos < 0, -1, pos + start), chunk, 1 if alone else engine.CHUNKS)

    def extend(self, rows: Sequence[Sequence[int]], progress: Progress | None = None) -> None:
        """Reads more tokens of each row; `progress(done, total)` counts the tokens of the longest between two calls.

        Ctrl-C, or an exception of `progress`, ends it there: the session then has what was read until then. Raises
        ValueError, and leaves the session as it is, where tokens are not the model's or have no room.
        """
        self._check(rows)
        chunk = engine.chunk_for(max(map(len, rows)), self.chunk)
        total = max(len(old) + len(new) for old, new in zip(self.tokens, rows, strict=True))
        for tokens, pos in self.calls(rows):
            with _whole():
                if self._interleaved and self.keep and min(self._room) < chunk:
                    self._evict(self.chunk, _delete)
                logits, self.cache = engine.prefill(self.model, self.params, tokens, pos, self.cache, chunk=chunk)
                idle = pos[:, -1:] < 0  # rows with nothing new
                self.logits = logits if self.logits is None or not idle.any() else jnp.where(idle, self.logits, logits)
                self._add([row[at >= 0].tolist() for row, at in zip(tokens, pos, strict=True)])
                jax.block_until_ready(self.logits)  # so that the count is of work done
            if progress:
                progress(int(pos.max()) + 1, total)

    def start(self, sampler: Sampler) -> engine.State:
        """The state from which `decode` goes on."""
        if self.logits is None or not all(self.tokens):
            raise ValueError("the session has no logits to go on from: it must read a token of each row first")
        return engine.start(self.logits, self.tokens, self.cache, sampler)

    def decode(
        self, state: engine.State, limit: int, *, sampler: Sampler, stops: Int[np.ndarray, " E"], burst: int
    ) -> tuple[Int[np.ndarray, "B limit"], engine.State]:
        """The next `limit` tokens of each row, at most `burst`, and -1 after one of `stops`: see `engine.decode`.

        The session has then read them. The state is used up.
        """
        if limit > min(self._room):
            raise ValueError(f"{limit} tokens more, but the session has room for {min(self._room)}")
        with _whole():
            out, state = engine.decode(*self._decode_args(state, sampler, stops, limit), sampler=sampler, room=burst)
            tokens = np.asarray(out)[:, :limit]
            self.cache, self.logits = state.cache, state.logits
            self._add([row[row >= 0].tolist() for row in tokens])
        return tokens, state

    def _decode_args(self, state: engine.State, sampler: Sampler, stops: np.ndarray, limit: int) -> tuple[Any, ...]:
        return self.model, self.params, state, self._keys(sampler), stops, np.int32(limit)

    def _keys(self, sampler: Sampler) -> Key[Array, " B"]:
        return jnp.broadcast_to(jax.random.key(sampler.seed), len(self.tokens))

    def programs(
        self, parts: Sequence[Sequence[Sequence[int]]], room: int, **decoding: Any
    ) -> dict[str, list[Prepare]]:
        """What runs when these parts are read and an answer goes into `room`, by name."""
        found: dict[str, list[Prepare]] = {}
        for rows in parts:
            chunk = engine.chunk_for(max(map(len, rows)), self.chunk)
            for tokens, pos in self.calls(rows):
                args = self.model, self.params, tokens, pos, self.cache
                found[f"prefill of {tokens.shape[1]} tokens"] = [partial(engine.prefill.prepare, *args, chunk=chunk)]
        held = [sum(map(len, rows)) for rows in zip(self.tokens, *parts, strict=True)]
        if self.eviction and self._evicts(max(held)):
            args = self.params, self.cache, self.eviction, self.keep, self._sizes(held), room
            found["eviction"] = snapkv.programs(*args, votes=self.model.ops.votes)
        found["decode"] = [partial(self._prepare_decode, held, room, **decoding)]
        return found

    def _prepare_decode(
        self, held: list[int], room: int, *, sampler: Sampler, stops: np.ndarray, burst: int
    ) -> Callable[[], None]:
        def state(logits: Array, cache: Any) -> engine.State:
            if self.eviction and self._evicts(max(held)):
                cache, _ = snapkv.evict(self.params, cache, self.eviction, self.keep, self._sizes(held), room)
            cache = snapkv.unobserved(cache) if self.eviction else cache
            return engine.start(logits, [[0]] * len(held), cache, sampler)

        logits = jax.ShapeDtypeStruct((len(held), self.model.config.vocab), jnp.float32)
        # Shapes alone: whatever runs now may wait for what other threads compile.
        args = jax.eval_shape(state, logits, self.cache), jax.eval_shape(lambda: self._keys(sampler))
        return engine.decode.prepare(self.model, self.params, *args, stops, np.int32(1), sampler=sampler, room=burst)

    def fork(self) -> "Session":
        """A session in the same state, with arrays of its own."""
        return self._with(jax.tree.map(jnp.copy, self.cache))

    def evict(self, room: int) -> None:
        """Leaves what the eviction keeps, with room for so many new tokens; the cache observes no more.

        A stack of layers after the other, each deleted when its smaller one is there. Where nothing is to be evicted,
        nothing but the recent queries goes.
        """
        with _whole():
            if self._evicts(max(map(len, self.tokens))):
                self._evict(room, _delete)
            self.cache, self._observed = snapkv.unobserved(self.cache), [0] * len(self.tokens)

    def evicted(self, room: int) -> "Session":
        """A session in the state that `evict` would leave; this one stays whole, for another question."""
        if not self._evicts(max(map(len, self.tokens))):
            out = self.fork()
        else:
            out = self._with(tuple(one if is_full(one) else jax.tree.map(jnp.copy, one) for one in self.cache))
            out._evict(room, lambda old: None)
        out.cache, out._observed = snapkv.unobserved(out.cache), [0] * len(self.tokens)
        return out

    def mark(self) -> None:
        """Makes this a point that `rewind` can come back to, where the state could not be cut to it later.

        That takes a second copy of rings that may wrap and of recurrent states. There is one mark, the last.
        """
        lasting = all(_keeps(one, self.ctx) for one in self.cache)
        known = self._observed[0] >= min(self._window, len(self.tokens[0]))
        if not lasting and known and self.logits is not None:
            self._mark = len(self.tokens[0]), jnp.copy(self.logits), _copy(self._unlasting())

    def rewind(self, tokens: int) -> int:
        """Goes back to the row's first `tokens`, or to as many fewer as it must; returns how many are left.

        Full caches can be cut anywhere after the last eviction, rings until they wrap; where queries are observed, that
        many tokens more go, to be read again. Else there is the last `mark`, and then nothing.
        """
        if len(self.tokens) > 1:
            raise ValueError(f"a session of {len(self.tokens)} rows cannot be cut back, only one of a single row")
        now = len(self.tokens[0])
        if tokens >= now:
            return now
        cut, (mark, logits, kept) = max(tokens - self._window, 0), self._mark or (0, jnp.zeros(0), None)
        if not all(_keeps(one, now) for one in self.cache) or cut < self._evicted:
            cut = 0
        if max(cut, self._evicted) <= mark <= tokens and mark > 0:
            cut, self.logits, self._observed = mark, jnp.copy(logits), [mark]
            self.cache = _cut(self.cache, cut, _copy(kept))
        elif cut:
            self.cache, self.logits, self._observed = _cut(self.cache, cut, self._unlasting()), None, [0]
            self._mark = self._mark if mark <= cut else None
        else:
            self._begin(1)
            return 0
        self._room[0] += now - cut
        del self.tokens[0][cut:]
        return cut

    @property
    def _interleaved(self) -> bool:
        return self.eviction is not None and self.eviction.interleaved

    def _evicts(self, tokens: int) -> bool:
        """Whether `evict` makes new caches for so many tokens: interleaved ones have no slots for an answer."""
        return self.keep > 0 and (self._interleaved or self.keep < tokens)

    @property
    def _window(self) -> int:
        """Tokens whose queries the cache keeps."""
        return max((one.recent_q.shape[2] for one in self.cache if _observes(one)), default=0)

    def _sizes(self, tokens: list[int]) -> list[int]:
        """Tokens of a prompt for which a press makes its budgets: those of parts are the whole one's."""
        return [self.ctx] * len(tokens) if self._interleaved else tokens

    def _check_caches(self) -> None:
        if any(a.is_deleted() for a in jax.tree.leaves(self.cache)):
            raise ValueError("the session's caches were lost in an error before")

    def _check(self, rows: Sequence[Sequence[int]]) -> None:
        self._check_caches()
        if len(rows) != len(self.tokens) or not any(rows):
            raise ValueError(f"{len(rows)} rows for a session of {len(self.tokens)}, of which one must have new tokens")
        vocab = self.model.config.vocab
        for old, new, room in zip(self.tokens, rows, self._room, strict=True):
            if wrong := [i for i in new if not 0 <= i < vocab]:
                raise ValueError(f"the token ids {wrong[:5]}, but the model's are from 0 to {vocab - 1}")
            room = self.ctx - len(old) if self._interleaved else room
            if len(new) > room:
                raise ValueError(f"{len(new)} tokens after {len(old)}, but the session has room for {room} more")

    def _add(self, rows: Sequence[Sequence[int]]) -> None:
        for i, row in enumerate(rows):
            self.tokens[i] += row
            self._room[i] -= len(row)
            self._observed[i] += len(row)

    def _evict(self, room: int, done: Callable[[KVCache], None]) -> None:
        assert self.eviction is not None
        window = self.eviction.press.window
        for row, seen in zip(self.tokens, self._observed, strict=True):
            if seen < min(window, len(row)):
                raise ValueError(f"the press looks from {window} tokens, but only the last {seen} were observed")
        sizes = self._sizes(list(map(len, self.tokens)))
        args = self.params, self.cache, self.eviction, self.keep, sizes, room
        self.cache, self.kept = snapkv.evict(*args, votes=self.model.ops.votes, done=done)
        self._room, self._evicted = [room] * len(self.tokens), max(map(len, self.tokens))

    def _with(self, cache: Any) -> "Session":
        out = copy.copy(self)
        out.cache, out.logits = cache, None if self.logits is None else jnp.copy(self.logits)
        out.tokens, out._room, out._observed = [[*row] for row in self.tokens], [*self._room], [*self._observed]
        return out

    def _unlasting(self) -> list[Any]:
        """What no cut brings back to an earlier state: rings, recurrent states, recent queries."""
        return [one.recent_q if is_full(one) else one for one in self.cache]


def _is_cache(one: Any) -> bool:
    return isinstance(one, KVCache)


def _blank(shapes: Any) -> Any:
    """What holds nothing, in these shapes."""
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return replace(zeros, pos=zeros.pos - 1) if isinstance(zeros, KVCache) else zeros


def _slots(cache: Any) -> list[int]:
    """Those of each stack of caches without a window."""
    return [one.k.shape[3] for one in cache if is_full(one)]


def _observes(one: Any) -> bool:
    return isinstance(one, KVCache) and one.recent_q is not None


def _keeps(one: Any, tokens: int) -> bool:
    """Whether it still has all of so many tokens."""
    return is_full(one) or (isinstance(one, KVCache) and tokens <= one.k.shape[3])


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _delete(stack: KVCache) -> None:
    for a in (stack.k, stack.v, stack.pos):
        a.delete()


def _cut(cache: Any, tokens: int, unlasting: list[Any]) -> Any:
    """The cache without positions from `tokens` on, and with these in place of what cannot be cut."""

    def one(stack: Any, other: Any) -> Any:
        stack = replace(stack, recent_q=other) if is_full(stack) else other
        return replace(stack, pos=jnp.where(stack.pos < tokens, stack.pos, -1)) if isinstance(stack, KVCache) else stack

    return tuple(map(one, cache, unlasting))


@contextmanager
def _whole() -> Iterator[None]:
    """Holds Ctrl-C back to the end: a call that has taken the caches over must give them back."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    caught: list[Any] = []
    signal.signal(signal.SIGINT, lambda *received: caught.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        before(*caught[0])
