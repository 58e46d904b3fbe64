"""Writing: every position in its slot and nothing else touched. The ring: every query sees exactly its window."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxinfer.cache import KVCache, empty, ring_slots, write
from jaxinfer.ops.attention import visible

pytestmark = pytest.mark.usefixtures("quick_compiler")

write_jit = jax.jit(write, donate_argnums=0)


def entries(pos: np.ndarray, kv_heads: int, width: int):
    """Keys and values [B, T, K, H] that tell what they are: row, position, head and element, and a sign for values."""
    row, head, element = np.arange(len(pos)), np.arange(kv_heads), np.arange(width)
    k = row[:, None, None, None] * 1000 + pos[..., None, None] * 10 + head[:, None] + element / width + 1
    return jnp.asarray(k, jnp.float32), jnp.asarray(-k, jnp.float32)


def put(cache: KVCache, layer: int, pos: np.ndarray) -> KVCache:
    return write_jit(cache, layer, *entries(pos, *cache.k.shape[2::2]), jnp.asarray(pos, jnp.int32))


def check(cache: KVCache, layer: int, rows: list[list[int]]):
    """The layer holds these positions in each row, each in its slot with its own key and value, and no others."""
    slots = cache.k.shape[3]
    for row, positions in enumerate(rows):
        want = np.full(slots, -1)
        want[np.array(positions, int) % slots] = positions
        np.testing.assert_array_equal(cache.pos[layer, row], np.broadcast_to(want, cache.pos.shape[2:]))
        k, v = entries(np.broadcast_to(want, (len(rows), slots)), *cache.k.shape[2::2])
        taken = want >= 0
        np.testing.assert_array_equal(cache.k[layer, row][:, taken], k[row].swapaxes(0, 1)[:, taken])
        np.testing.assert_array_equal(cache.v[layer, row][:, taken], v[row].swapaxes(0, 1)[:, taken])
        assert not np.asarray(cache.k[layer, row])[:, ~taken].any()


def test_empty():
    cache = empty(2, 3, 4, 5, 6, jnp.bfloat16)
    assert (cache.k.shape, cache.v.shape, cache.pos.shape) == ((2, 3, 4, 5, 6), (2, 3, 4, 5, 6), (2, 3, 1, 5))
    assert (cache.k.dtype, cache.v.dtype, cache.pos.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.int32)
    assert (np.asarray(cache.pos) < 0).all()


def test_write_touches_its_slots_alone():
    cache = put(empty(3, 2, 2, 8, 4, jnp.float32), 1, np.array([[-1, 0, 1, 2], [-1, -1, -1, 0]]))
    check(cache, 1, [[0, 1, 2], [0]])
    for other in (0, 2):
        check(cache, other, [[], []])
    cache = put(cache, 1, np.array([[3, 4, 5, 6], [-1, 1, 2, 3]]))
    check(cache, 1, [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3]])


def test_heads_may_have_positions_of_their_own():
    shared, other = (empty(1, 1, 2, 4, 3, jnp.float32) for _ in range(2))
    apart = KVCache(other.k, other.v, jnp.repeat(other.pos, 2, axis=2))
    pos = np.array([[-1, 0, 1, 2]])
    shared, apart = put(shared, 0, pos), put(apart, 0, pos)
    np.testing.assert_array_equal(apart.k, shared.k)
    np.testing.assert_array_equal(apart.pos[0, 0], [[0, 1, 2, -1]] * 2)


def test_write_rounds_to_the_caches_type():
    cache = empty(1, 1, 1, 2, 3, jnp.bfloat16)
    new = jnp.full((1, 1, 1, 3), 1.001)
    cache = write(cache, 0, new, -new, jnp.zeros((1, 1), jnp.int32))
    assert cache.k.dtype == jnp.bfloat16
    assert (cache.k[0, 0, 0].tolist(), cache.v[0, 0, 0, 0].tolist()) == ([[1, 1, 1], [0, 0, 0]], [-1, -1, -1])


def test_a_ring_wraps():
    cache = empty(1, 1, 2, 5, 4, jnp.float32)
    for start in range(0, 24, 3):
        cache = put(cache, 0, start + np.arange(3)[None])
    check(cache, 0, [list(range(19, 24))])


def test_padding_never_takes_a_live_slot():
    """Not the last one, where -1 would lie, nor another, whatever the negative number; a whole row may be padding."""
    cache = put(empty(1, 2, 1, 4, 2, jnp.float32), 0, np.arange(4)[None].repeat(2, 0))
    cache = put(cache, 0, np.array([[-1, -1, -1, -1], [-7, -2, -1, 4]]))
    check(cache, 0, [[0, 1, 2, 3], [1, 2, 3, 4]])


def test_rows_are_at_their_own_positions():
    cache = put(empty(1, 3, 1, 8, 2, jnp.float32), 0, np.array([[5, 6], [-1, 0], [13, 14]]))
    check(cache, 0, [[5, 6], [0], [13, 14]])


def test_a_scan_over_chunks_writes_what_single_calls_do():
    pos = np.array([[-1, -1, -1, *range(9)], [-1, *range(11)]])
    chunks = pos.reshape(2, 4, 3).swapaxes(0, 1)
    one_by_one = empty(2, 2, 2, 7, 4, jnp.float32)
    for chunk in chunks:
        one_by_one = put(put(one_by_one, 0, chunk), 1, chunk)
    k, v = (jnp.stack(a) for a in zip(*(entries(chunk, 2, 4) for chunk in chunks), strict=True))

    @jax.jit
    def scanned(cache):
        def step(cache, xs):
            return lax.fori_loop(0, 2, lambda layer, cache: write(cache, layer, *xs), cache), None

        return lax.scan(step, cache, (k, v, jnp.asarray(chunks, jnp.int32)))[0]

    cache = scanned(empty(2, 2, 2, 7, 4, jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, cache, one_by_one)
    check(cache, 1, [list(range(2, 9)), list(range(4, 11))])


def test_a_donated_cache_is_written_in_place():
    cache = empty(2, 1, 2, 8, 4, jnp.float32)
    where = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(cache)]
    assert len(set(where)) == 3  # each its own buffer, or none could be donated
    new = put(cache, 0, np.arange(3)[None])
    assert all(a.is_deleted() for a in jax.tree.leaves(cache))
    assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(new)] == where


@partial(jax.jit, static_argnames="window")
def write_and_look(cache: KVCache, pos, window):
    """One call of a model with keys whose value is their position: the values of all keys that each query may see."""
    key = jnp.broadcast_to(pos[..., None, None], (*pos.shape, 1, 1)).astype(jnp.float32)
    cache = write(cache, 0, key, key, pos)
    seen = visible(pos, cache.pos[0], window)[:, 0]  # [B, T, S]
    return cache, jnp.where(seen, cache.k[0, :, 0, None, :, 0], -1)


def lost_keys(window: int, chunk: int, slots: int, turns: list[list[int]], cache: KVCache | None = None) -> int:
    """Runs turns of some tokens a row, each padded on the left to whole chunks; counts (query, key) pairs that differ.

    Every query must see the keys of the `window` positions up to its own, and nothing else.
    """
    batch = len(turns[0])
    cache, done, lost = cache or empty(1, batch, 1, slots, 1, jnp.float32), np.zeros(batch, int), 0
    for turn in turns:
        width = -(-max(turn) // chunk) * chunk
        pos = np.full((batch, width), -1)
        for row, n in enumerate(turn):
            pos[row, width - n :] = done[row] + np.arange(n)
        done += turn
        for start in range(0, width, chunk):
            part = pos[:, start : start + chunk]
            cache, keys = write_and_look(cache, jnp.asarray(part, jnp.int32), window)
            for row, t in np.ndindex(part.shape):
                p = int(part[row, t])
                want = set(range(max(0, p - window + 1), p + 1)) if p >= 0 else set()
                lost += len(want ^ (set(np.asarray(keys)[row, t].astype(int).tolist()) - {-1}))
    return lost


sizes = {"window": st.integers(2, 6), "chunk": st.integers(1, 4)}
some_turns = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=2), min_size=1, max_size=5)  # of two rows


@given(**sizes, turns=some_turns, spare=st.integers(0, 1))
@settings(max_examples=40, deadline=None)
def test_a_ring_of_window_and_chunk_less_one_loses_nothing(window, chunk, turns, spare):
    assert lost_keys(window, chunk, window + chunk - 1 + spare, turns) == 0


@pytest.mark.parametrize(("window", "chunk"), [(2, 1), (3, 3), (6, 4), (4, 5), (512, 256)])
def test_a_ring_one_slot_shorter_loses_keys(window, chunk):
    turns = [[2 * window + 3 * chunk]]
    assert lost_keys(window, chunk, window + chunk - 1, turns) == 0
    assert lost_keys(window, chunk, window + chunk - 2, turns) > 0


def test_a_chat_of_padded_turns_in_a_ring():
    turns = [[300], [37], [512], [1], [256], [700], [5]]
    assert lost_keys(512, 256, 767, turns) == 0
    assert lost_keys(512, 256, 766, turns) > 0


@pytest.mark.parametrize(
    ("window", "chunk", "slots"),
    [(1, 1, 256), (16, 64, 256), (512, 1, 640), (512, 129, 768), (512, 130, 896), (1024, 2048, 3200)],
)
def test_the_ring_of_a_window_is_whole_blocks_and_one_to_spare(window, chunk, slots):
    assert ring_slots(window, chunk) == slots
    ring = empty(1, 1, 1, 10**5, 1, jnp.float32, window=window, chunk=chunk)
    assert (ring.k.shape[3], ring.chunk) == (slots, chunk)
    assert empty(1, 1, 1, 100, 1, jnp.float32, window=window, chunk=chunk).k.shape[3] == 100  # never wraps
    assert empty(1, 1, 1, 10**5, 1, jnp.float32, chunk=chunk).k.shape[3] == 10**5


def test_a_ring_made_for_a_window_loses_nothing_and_refuses_longer_calls():
    ring = empty(1, 1, 1, 10**5, 1, jnp.float32, window=20, chunk=48)
    assert lost_keys(20, 48, 0, [[300], [5], [170]], ring) == 0
    with pytest.raises(ValueError, match="a call of 49 tokens, but this cache was made for 48 at a time"):
        put(empty(1, 1, 1, 10**5, 1, jnp.float32, window=20, chunk=48), 0, np.arange(49)[None])
