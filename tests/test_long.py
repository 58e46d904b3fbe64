"""Long prompts through rings: the very bits of full caches with the window as a mask, however a prompt is cut."""

from dataclasses import replace
from functools import cache, partial
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import model_path

import jaxinfer
from jaxinfer import Sampler, engine
from jaxinfer import cache as caches
from jaxinfer.cache import KVCache, ring_slots
from jaxinfer.ops import CPU, REFERENCE, Ops
from jaxinfer.ops.attention import attention_reference

UNSKIPPED = REFERENCE._replace(attention=partial(attention_reference, skip=False))

# Other matrix shapes, other orders of f32 sums: ten times the 7e-5 that llama.cpp's own logits move by when its batch
# size changes, see goldens/README.md.
TOLERANCE = {"rtol": 0, "atol": 7e-4}


@cache
def load(name: str, ops: Ops = REFERENCE, window: int | None = None):
    """A tiny model; with `window` in place of its own, which is but a number."""
    model, params, _ = jaxinfer.load(model_path(name), ops=ops, expand=False)
    if window is None:
        return model, params
    config = model.config
    mixers = ((kind, replace(m, window=window) if getattr(m, "window", None) else m) for kind, m in config.mixers)
    return replace(model, config=replace(config, mixers=tuple(mixers))), params


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 288, n).tolist()


def unwrapped(held, slots: int):
    """An empty cache in which all layers have the same slots, so that a window is nothing but a mask."""

    def one(stack):
        if not isinstance(stack, KVCache):
            return stack
        repeats, batch, heads, _, width = stack.k.shape
        return caches.empty(repeats, batch, heads, slots, width, stack.k.dtype)

    return tuple(map(one, held))


def rings(held) -> list[KVCache]:
    return [one for one in held if isinstance(one, KVCache) and one.chunk is not None]


def read(model, params, parts, chunk, held, start=None):
    """Logits at every position of each row [n, V], turn by turn, each padded on the left to whole chunks; the cache."""
    start = np.zeros(len(parts[0]), np.int32) if start is None else start
    found = [[] for _ in parts[0]]
    for rows in parts:
        tokens, pos = engine.left_pad(rows, chunk)
        pos = np.where(pos < 0, -1, pos + start[:, None]).astype(np.int32)
        for i in range(0, tokens.shape[1], chunk):
            t, p = tokens[:, i : i + chunk], pos[:, i : i + chunk]
            logits, held = engine.chunk_logits(model, params, t, p, held)
            for row, one in enumerate(np.asarray(logits)):
                found[row].append(one[p[row] >= 0])
        start = start + np.array([len(row) for row in rows], np.int32)
    return [np.concatenate(one) for one in found], held


def greedy(model, params, logits, rows, held, steps=6) -> np.ndarray:
    state = engine.start(jnp.asarray(logits), rows, held, Sampler.greedy())
    keys = jnp.broadcast_to(jax.random.key(0), len(rows))
    stops = np.array([-1], np.int32)
    return np.asarray(engine.decode(model, params, state, keys, stops, steps, sampler=Sampler.greedy(), room=steps)[0])


# Turns of a ragged chat: with the first the rings of both rows wrap; then some of less than a chunk.
TURNS = [[prompt(310, 1), prompt(280, 2)], [prompt(5, 3), prompt(40, 4)], [prompt(61, 5), prompt(1, 6)]]
ROWS = [list(chain(*rows)) for rows in zip(*TURNS, strict=True)]
SLOTS = 512


@cache
def chat(name: str, chunk: int, window: int, dtype: str, answer: bool, *, ring: bool = True, skip: bool = True):
    """Logits of all tokens of the turns, the slots of those caches that are rings, and greedy tokens after it."""
    model, params = load(name, REFERENCE if skip else UNSKIPPED, window)
    held = model.init_cache(params, 2, SLOTS, chunk=chunk, dtype=jnp.dtype(dtype))
    held = held if ring else unwrapped(held, SLOTS)
    logits, held = read(model, params, TURNS, chunk, held)
    slots = {one.k.shape[3] for one in rings(held)}
    return logits, slots, greedy(model, params, [one[-1] for one in logits], ROWS, held) if answer else None


CHATS = {
    "bfloat16": ("gemma4-e", 48, 16, "bfloat16", False),  # chunks longer than the window; layers that share keys
    "gpt-oss": ("gpt-oss", 48, 64, "float32", True),  # shorter ones; sinks
}


def assert_same_chat(one, other):
    for logits, want in zip(one[0], other[0], strict=True):
        np.testing.assert_array_equal(logits, want)
    np.testing.assert_array_equal(one[2], other[2])
    assert one[2] is None or len(np.unique(one[2])) > 2


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("name", CHATS)
def test_a_ring_gives_the_bits_of_a_full_cache_with_a_mask(name):
    case = CHATS[name]
    one, other = chat(*case), chat(*case, ring=False)
    assert (one[1], other[1]) == ({ring_slots(case[2], case[1])}, set())
    assert max(one[1]) < len(TURNS[0][1])
    assert_same_chat(one, other)


@pytest.mark.usefixtures("quick_compiler")
def test_skipping_changes_no_bit():
    case = CHATS["gpt-oss"]
    for logits, want in zip(chat(*case)[0], chat(*case[:-1], False, skip=False)[0], strict=True):
        np.testing.assert_array_equal(logits, want)


@pytest.mark.usefixtures("quick_compiler")
def test_keys_before_the_window_are_not_visited():
    """Values that are no number there harm nothing: times the weight 0 they would give no number either."""
    name, chunk, window = CHATS["gpt-oss"][:3]
    last, start = [prompt(48, 7), prompt(48, 8)], np.array(list(map(len, TURNS[0])), np.int32)

    def after(skip: bool, poisoned: bool) -> np.ndarray:
        model, params = load(name, REFERENCE if skip else UNSKIPPED, window)
        held = model.init_cache(params, 2, SLOTS, chunk=chunk)
        _, held = read(model, params, TURNS[:1], chunk, held)

        def poison(stack):
            if stack.chunk is None:
                return stack
            seen = stack.pos[:, :, 0] > start[:, None] - 1 - window
            return replace(stack, v=jnp.where(seen[:, :, None, :, None], stack.v, jnp.nan))

        held = tuple(map(poison, held)) if poisoned else held
        return np.stack(read(model, params, [last], chunk, held, start)[0])

    clean = after(skip=True, poisoned=False)
    np.testing.assert_array_equal(after(skip=True, poisoned=True), clean)
    assert np.isnan(after(skip=False, poisoned=True)).any()


WINDOW = 512
LONG = prompt(8292, 9)


@cache
def long(*turns: int, chunk: int, ring: bool = True, ops: Ops = CPU):
    """Logits [n, V] of so many of the prompt's tokens, read in these turns, and the cache; first turns are shared."""
    model, params = load("gemma4-dense", ops, WINDOW)
    if not turns:
        slots = engine.slots_for(len(LONG))
        held = model.init_cache(params, 1, slots, chunk=chunk)
        return np.zeros((0, model.config.vocab), np.float32), held if ring else unwrapped(held, slots)
    known, held = long(*turns[:-1], chunk=chunk, ring=ring, ops=ops)
    n, held = len(known), jax.tree.map(jnp.copy, held)  # reading takes it over
    (logits,), held = read(model, params, [[LONG[n : n + turns[-1]]]], chunk, held, np.array([n], np.int32))
    return np.concatenate([known, logits]), held


def sizes(held) -> set[int]:
    return {one.k.shape[3] for one in rings(held)}


def assert_alike(one: np.ndarray, other: np.ndarray):
    """Logits within the tolerance, and the same best tokens wherever these are ahead by more than it."""
    np.testing.assert_allclose(one, other, **TOLERANCE)
    best = np.sort(one, axis=-1)[:, -2:]
    ahead = best[:, 1] - best[:, 0] > 2 * TOLERANCE["atol"]
    assert ahead.mean() > 0.9
    np.testing.assert_array_equal(one.argmax(-1)[ahead], other.argmax(-1)[ahead])


def test_a_long_prompt_through_a_ring_that_wraps_gives_the_bits_of_a_full_cache():
    """8292 tokens: two chunks of 4096, and a last one that is shorter than the window and reads beyond its border."""
    one, held = long(4096, 4096, 100, chunk=4096, ops=REFERENCE)
    other, full = long(4096, 4096, 100, chunk=4096, ops=REFERENCE, ring=False)
    assert (sizes(held), sizes(full)) == ({4736}, set())
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "turns", [(4096, 200), (4096, 944), (4096, 4096, 100), (700,)], ids=lambda turns: str(sum(turns))
)
def test_chunks_of_another_size_overwrite_the_ring_at_other_times(turns):
    """Calls of 4096 tokens against 256: whole multiples of both, 8192 among them, and less than a window beyond."""
    one, held = long(*turns, chunk=4096, ops=REFERENCE)
    other, small = long(8292, chunk=256)
    assert (sizes(held), sizes(small)) == ({4736}, {896})
    assert_alike(one, other[: sum(turns)])


def test_tokens_one_by_one_give_the_same():
    one, held = long(700, chunk=1)
    assert sizes(held) == {640}  # wrapped, past a window
    assert_alike(one, long(8292, chunk=256)[0][:700])
