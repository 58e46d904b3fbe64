"""Eviction in whole models: the queries that are kept for it, what is left after it, and how decoding goes on.

Scores and lists by themselves are in test_presses.py.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import model_path

import jaxinfer
from jaxinfer import Sampler, engine, snapkv
from jaxinfer.cache import KVCache, size_bytes, write
from jaxinfer.ops import CPU, REFERENCE, Ops
from jaxinfer.ops.attention import attention_blocks, visible
from jaxinfer.presses import Knorm, LagKV, Press, PyramidKV, SnapKV
from jaxinfer.session import Session
from jaxinfer.snapkv import Eviction

pytestmark = pytest.mark.usefixtures("quick_compiler")

GREEDY = Sampler.greedy()
NEVER = np.array([-1], np.int32)

# Other matrix shapes, other orders of f32 sums: ten times the 7e-5 that llama.cpp's own logits move by when its batch
# size changes, see goldens/README.md.
TOLERANCE = {"rtol": 0, "atol": 7e-4}


@cache
def load(name: str, ops: Ops = REFERENCE, expand: bool = False):
    return jaxinfer.load(model_path(name), ops=ops, expand=expand)[:2]


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 288, n).tolist()


def stacks_of(held) -> list[KVCache]:
    """Those that can be evicted from."""
    return [one for one in held if isinstance(one, KVCache) and one.chunk is None]


def map_full(f, held, *others):
    """The cache with f(stack, ...) in the place of each stack that can be evicted from."""

    def one(stack, *other):
        return f(stack, *other) if isinstance(stack, KVCache) and stack.chunk is None else stack

    return tuple(map(one, held, *others))


def read(model, params, rows, chunk, held, start=0):
    """Logits at all positions of each row [n, V], and the cache."""
    tokens, pos = engine.left_pad(rows, chunk)
    pos = np.where(pos < 0, -1, pos + start).astype(np.int32)
    parts = []
    for i in range(0, tokens.shape[1], chunk):
        logits, held = engine.chunk_logits(model, params, tokens[:, i : i + chunk], pos[:, i : i + chunk], held)
        parts.append(np.asarray(logits))
    logits = np.concatenate(parts, axis=1)
    return [logits[i, -len(row) :] for i, row in enumerate(rows)], held


def copied(held):
    return jax.tree.map(jnp.copy, held)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# A ragged batch of one model each: dense; windows and shared keys; sinks; a hybrid with experts.
KINDS = ["qwen3", "gemma4-e", "gpt-oss", "qwen35moe"]
ROWS = [prompt(96, 1), prompt(75, 2)]
CHUNK, WINDOW, SLOTS = 24, 8, 256


@cache
def known(name: str, observe: int = WINDOW):
    model, params = load(name)
    return read(model, params, ROWS, CHUNK, model.init_cache(params, 2, SLOTS, chunk=CHUNK, observe=observe))


@pytest.mark.parametrize("name", ["qwen3", "gemma4-e", "qwen35moe"])
def test_keeping_queries_changes_no_bit(name):
    (logits, held), (want, plain) = known(name), known(name, observe=0)
    assert_same(logits, want)
    assert all(np.asarray(one.recent_q).any() for one in stacks_of(held))
    assert all(one.recent_q is None for one in stacks_of(plain))
    assert_same(snapkv.unobserved(held), plain)


def test_nor_in_decoding():
    model, params = load("qwen3")
    found = []
    for observe in (WINDOW, 0):
        logits, held = known("qwen3", observe)
        state = engine.start(jnp.stack([one[-1] for one in logits]), ROWS, copied(held), GREEDY)
        keys = jnp.broadcast_to(jax.random.key(0), 2)
        out, state = engine.decode(model, params, state, keys, NEVER, 8, sampler=GREEDY, room=8)
        found.append((np.asarray(out), state.logits, snapkv.unobserved(state.cache)))
        assert (stacks_of(state.cache)[0].recent_q is None) == (observe == 0)
    assert_same(*found)


def recording(found: dict) -> Ops:
    """Operations that put each call's queries, times the scale, and their positions under (place in the program,
    layer of its stack)."""
    place = count()

    def attention(q, held, layer, pos, *, scale, window=None, **options):
        if window is None:
            here = next(place)

            def put(*x):
                found.setdefault((here, int(x[0])), []).append([np.asarray(a) for a in x[1:]])

            jax.debug.callback(put, layer, q.astype(jnp.float32) * scale, pos, jnp.int32(held.k.shape[3]))
        return attention_blocks(q, held, layer, pos, scale=scale, window=window, **options)

    return CPU._replace(attention=attention)


@cache
def captured(name: str, chunk: int):
    """Queries kept of a ragged batch, one row shorter than the window, [readers, B, W, K, G, H]: as the cache has them,
    and as attention had them."""
    found: dict = {}
    model, params = load(name)
    model = replace(model, ops=recording(found))
    rows, window = [prompt(70, 3), prompt(13, 4)], 20
    held = model.init_cache(params, 2, SLOTS, chunk=chunk, observe=window)
    tokens, pos = engine.left_pad(rows, chunk)
    for i in range(0, tokens.shape[1], chunk):
        _, held = engine.chunk_logits(model, params, tokens[:, i : i + chunk], pos[:, i : i + chunk], held)
        jax.effects_barrier()
    want = []
    for calls in (found[key] for key in sorted(found)):
        q, at = (np.concatenate(part, axis=1) for part in list(zip(*calls, strict=True))[:2])
        last = [one[p >= 0][-window:] for one, p in zip(q, at, strict=True)]
        want.append([np.pad(one, ((window - len(one), 0), *[(0, 0)] * 3)) for one in last])
    return np.concatenate([np.asarray(one.recent_q) for one in stacks_of(held)]), np.array(want), len(found)


@pytest.mark.parametrize(
    ("name", "chunk", "readers"),
    [
        ("qwen3", 1, 3),
        ("qwen3", 48, 3),  # the window of 20 spans two chunks
        ("gemma4-e", 12, 2),  # the second has no keys of its own
    ],
)
def test_the_kept_queries_are_those_that_attention_had(name, chunk, readers):
    queries, want, sites = captured(name, chunk)
    assert (queries.shape[0], sites) == (readers, readers)
    np.testing.assert_array_equal(queries, want)
    assert not queries[:, 1, :7].any()  # padding is none of them
    assert queries[:, 1, 7:].any((2, 3, 4)).all()
    if name == "qwen3":
        np.testing.assert_allclose(queries, captured(name, 1)[0], **TOLERANCE)


@dataclass(frozen=True, kw_only=True)
class EveryOther(Press):
    """A press of this file's own: even positions, the latest first; heads begin at different ones."""

    def __call__(self, queries, k, v, pos, valid, sinks=None, received=None):
        even = (pos + jnp.arange(k.shape[1])[:, None]) % 2 == 0
        return jnp.where(pos < 0, -jnp.inf, jnp.where(even, pos, -pos).astype(jnp.float32))


SNAP = SnapKV(window=WINDOW)
WIDE = 128  # slots after every eviction, whatever it keeps: one shape to compile


def evicted(name: str, eviction: Eviction, keep: int):
    """The compacted cache, and the whole one with the evicted positions masked, each head by its list; the lists."""
    _, held = known(name)
    _, params = load(name)
    sizes = list(map(len, ROWS))
    width = max(a.shape[-1] for a in jax.tree.leaves(snapkv.evict(params, held, eviction, keep, sizes, 0).kept))
    out = snapkv.evict(params, held, eviction, keep, sizes, WIDE - width)
    narrow = [one.k.shape[3] for one in stacks_of(out.cache)]
    assert max(narrow) == WIDE

    def mask(stack, lists):
        stays = (jnp.arange(stack.k.shape[3]) == lists[..., None]).any(-2)  # [R, B, L, S]
        stays = jnp.broadcast_to(stays, stack.k.shape[:4])
        return replace(stack, pos=jnp.where(stays, stack.pos, -1))

    masked = map_full(mask, held, out.kept)
    return copied(snapkv.unobserved(out.cache)), copied(snapkv.unobserved(masked)), out.kept


@cache
def whole(name: str) -> np.ndarray:
    """The logits of such steps on the whole cache, in the program of a masked one: positions for each head."""
    held = snapkv.unobserved(known(name)[1])
    return steps(name, map_full(lambda s: replace(s, pos=jnp.broadcast_to(s.pos, s.k.shape[:4])), copied(held)))[1]


def steps(name: str, held, n: int = 6):
    """Greedy tokens and logits of each step after ROWS, in calls of one token; the cache."""
    model, params = load(name)
    logits = np.stack([one[-1] for one in known(name)[0]])
    tokens, found = [], []
    for i in range(n):
        tokens.append(logits.argmax(-1))
        at = np.array([[len(row) + i] for row in ROWS], np.int32)
        out, held = engine.chunk_logits(model, params, tokens[-1][:, None].astype(np.int32), at, held)
        found.append(logits := np.asarray(out)[:, 0])
    return np.array(tokens), np.array(found), held


CASES = [
    *((name, Eviction(press=SNAP), 40) for name in KINDS),
    ("qwen3", Eviction(press=EveryOther()), 40),
    ("qwen3", Eviction(press=PyramidKV(window=WINDOW, beta=4)), 40),
    ("qwen3", Eviction(press=SNAP, one_list=True), 40),
    ("gpt-oss", Eviction(press=PyramidKV(window=WINDOW, beta=4)), 40),
]


@pytest.mark.parametrize(
    ("name", "eviction", "keep"), CASES, ids=lambda x: type(x.press).__name__ if isinstance(x, Eviction) else str(x)
)
def test_a_compacted_cache_goes_on_as_a_whole_one_with_the_evicted_masked(name, eviction, keep):
    small, masked, kept = evicted(name, eviction, keep)
    tokens, logits, _ = steps(name, small)
    want_tokens, want, _ = steps(name, masked)
    np.testing.assert_array_equal(logits, want)
    np.testing.assert_array_equal(tokens, want_tokens)
    assert np.abs(logits - whole(name)).max() > 1e-3  # and something was lost
    for lists in jax.tree.leaves(kept):
        assert (np.diff(lists) > 0).all()
        assert lists.shape[2] == 1 or (np.asarray(lists)[:, :, 0] != np.asarray(lists)[:, :, 1]).any()


def test_keeping_all_changes_no_bit():
    small, _, kept = evicted("qwen3", Eviction(press=SNAP), 96)
    assert all(
        np.asarray(lists)[:, 0].tolist() == [[list(range(96))] * 2] * len(lists) for lists in jax.tree.leaves(kept)
    )
    np.testing.assert_array_equal(steps("qwen3", small)[1], whole("qwen3"))


def test_a_second_turn_on_a_compacted_cache():
    """Padded, in two chunks and past a wrap of the rows' own slots."""
    model, params = load("qwen3")
    small, masked, _ = evicted("qwen3", Eviction(press=SNAP), 40)
    rows, start = [prompt(21, 5), prompt(9, 6)], np.array([[len(row)] for row in ROWS])
    one, small = read(model, params, rows, 16, small, start)
    other, masked = read(model, params, rows, 16, masked, start)
    assert_same(one, other)
    for stack in stacks_of(small):
        newest = np.asarray(stack.pos).max((0, 2, 3))
        assert newest.tolist() == [96 + 20, 75 + 8]
        assert int((np.asarray(stack.pos[0, 0, 0]) >= 0).sum()) == 40 + 21


def test_a_few_tokens_at_once_after_an_eviction_are_steps_of_one():
    model, params = load("qwen3")
    small, again = (evicted("qwen3", Eviction(press=SNAP), 40)[0] for _ in range(2))
    tokens, logits, _ = steps("qwen3", small)
    start = np.array([[len(row)] for row in ROWS])
    got, _ = read(model, params, tokens.T.tolist(), 16, again, start)
    np.testing.assert_allclose(np.stack(got, 1), logits, **TOLERANCE)
    np.testing.assert_array_equal(np.stack(got, 1)[:-1].argmax(-1), tokens[1:])


def test_every_query_sees_what_was_kept_and_its_own_turn():
    """Slot by slot, for keys whose value is their position: each head's list, and all later positions up to its own."""
    pos = np.array([np.arange(40), np.r_[[-1] * 15, np.arange(25)]], np.int32)
    key = jnp.broadcast_to(jnp.asarray(pos, jnp.float32)[..., None, None], (2, 40, 2, 1))
    held = KVCache(jnp.zeros((1, 2, 2, 64, 1)), jnp.zeros((1, 2, 2, 64, 1)), jnp.full((1, 2, 1, 64), -1))
    put = jax.jit(write)
    held = put(held, 0, key, key, jnp.asarray(pos))
    kept = jnp.array([[[[0, 3, 4, 39], [1, 2, 38, 39]], [[5, 7, 23, 24], [0, 1, 2, 24]]]])
    held = snapkv.compact(held, kept, 12)
    now = np.array([40, 25])
    for turn in ([3, 1], [4, 0], [1, 1], [4, 4]):
        at = np.array([[-1] * (4 - n) + list(range(p, p + n)) for n, p in zip(turn, now, strict=True)], np.int32)
        key = jnp.broadcast_to(jnp.asarray(at, jnp.float32)[..., None, None], (2, 4, 2, 1))
        held, now = put(held, 0, key, key, jnp.asarray(at)), now + turn
        seen = np.asarray(visible(jnp.asarray(at), held.pos[0], None))  # [B, K, T, S]
        for b, head, t in np.ndindex(2, 2, 4):
            values = np.asarray(held.k)[0, b, head, seen[b, head, t], 0].astype(int).tolist()
            first = [40, 25][b]
            want = [*kept[0, b, head].tolist(), *range(first, at[b, t] + 1)] if at[b, t] >= 0 else []
            assert sorted(values) == want


def answer(session: Session, room: int, n: int = 6) -> np.ndarray:
    out, _ = session.decode(session.start(GREEDY), n, sampler=GREEDY, stops=NEVER, burst=room)
    return out


@cache
def summary(chunk: int, *sizes: int):
    """Scores and lists of a batch of prompts read in chunks, and the greedy answer after the eviction."""
    model, params = load("qwen3", CPU)
    eviction = Eviction(press=SnapKV(window=20), keep=64)
    session = Session(model, params, ctx=SLOTS, chunk=chunk, batch=len(sizes), eviction=eviction)
    session.extend([prompt(n, seed=n) for n in sizes])
    press, stacks = jax.jit(jax.vmap(eviction.press)), stacks_of(session.cache)
    scores = [np.asarray(press(s.recent_q[: len(s.k)], s.k, s.v, s.pos, valid(s))) for s in stacks]
    session.evict(8)
    logits = np.asarray(session.logits).copy()
    return logits, scores, [np.asarray(a) for a in jax.tree.leaves(session.kept)], answer(session, 8)


def valid(stack: KVCache) -> jax.Array:
    newest = stack.pos.max((2, 3))[..., None]
    return newest - jnp.arange(stack.recent_q.shape[2])[::-1] >= 0


def test_any_chunk_size_keeps_the_same():
    logits, scores, kept, tokens = summary(3, 144)
    want_logits, want, lists, others = summary(1, 144)
    np.testing.assert_allclose(logits, want_logits, **TOLERANCE)
    for one, other, at in zip(scores, want, lists, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)  # of a mean attention, far below 1
        ranked = -np.sort(-other[..., :144], axis=-1)
        assert at.shape[-1] == 64
        assert (ranked[..., 63] - ranked[..., 64] > 0).all()
    for one, other in zip(kept, lists, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(tokens, others)


def test_a_batch_keeps_what_single_rows_do():
    logits, _, kept, tokens = summary(3, 144, 95)  # whole calls of four chunks, which are one program
    for row, n in enumerate((144, 95)):
        want_logits, _, lists, others = summary(3, n)
        np.testing.assert_allclose(logits[row], want_logits[0], **TOLERANCE)
        np.testing.assert_array_equal(tokens[row], others[0])
        for one, other in zip(kept, lists, strict=True):
            np.testing.assert_array_equal(one[:, row], other[:, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "gemma4-e", "gpt-oss", "qwen35"])
def test_a_gpu_keeps_what_a_cpu_does(name):
    """The same lists and tokens, by each device's own operations."""
    found = []
    for kind in ("gpu", "cpu"):
        options = {"device": jax.devices(kind)[0], "dtype": jnp.float32, "expand": False}
        model, params, _ = jaxinfer.load(model_path(name), **options)
        session = Session(model, params, ctx=256, chunk=48, eviction=Eviction(press=SNAP, keep=64))
        session.extend([prompt(144)])
        session.evict(8)
        assert {d.platform for a in jax.tree.leaves(session.cache) for d in a.devices()} == {kind}
        found.append((jax.device_get(session.kept), answer(session, 8)))
    assert_same(*found)


@pytest.mark.parametrize("name", ["qwen3", "qwen35"])
def test_a_budget_of_2048_of_16384_tokens_takes_an_eighth(name):
    """Of a filled cache: all but the positions of each head, 4 bytes beside its key and value, falls eightfold."""
    model, params = load(name)
    rng = np.random.default_rng(0)

    def fill(stack):
        k, v, q = (jnp.asarray(rng.standard_normal(a.shape, np.float32)) for a in (stack.k, stack.v, stack.recent_q))
        return replace(stack, k=k, v=v, recent_q=q, pos=jnp.broadcast_to(jnp.arange(16384), stack.pos.shape))

    held = map_full(fill, model.init_cache(params, 1, 16384, chunk=512, observe=64))
    before = [(s.k.nbytes, s.v.nbytes, size_bytes((s.k, s.v, s.pos))) for s in stacks_of(held)]
    others = [one for one in held if not isinstance(one, KVCache) or one.chunk is not None]
    out = snapkv.evict(params, held, Eviction(press=SnapKV()), 2048, [16384], 0, done=lambda old: old.k.delete()).cache
    for (k, v, whole), stack in zip(before, stacks_of(out), strict=True):
        assert (k / stack.k.nbytes, v / stack.v.nbytes) == (8, 8)
        assert whole / size_bytes((stack.k, stack.v, stack.pos)) > 7.8
    left = [one for one in out if not isinstance(one, KVCache) or one.chunk is not None]
    assert all(a is b for a, b in zip(others, left, strict=True))
    assert (name == "qwen3") == (not others)
    assert all(s.k.is_deleted() for s in stacks_of(held))


@pytest.mark.optimised  # running takes the time
def test_an_answer_after_an_eviction_is_well_formed():
    """Of a hybrid, whose recurrent states stay."""
    model, params = load("qwen35", CPU)
    tokens, keep = 6144, 2048
    session = Session(model, params, ctx=tokens, chunk=tokens // 4, eviction=Eviction(press=SnapKV(), keep=keep))
    before = sum(s.k.nbytes + s.v.nbytes for s in stacks_of(session.cache))
    session.extend([prompt(tokens, seed=tokens)])
    tight = session.evicted(0)
    for stack in stacks_of(tight.cache):
        assert (np.asarray(stack.pos) >= 0).all()
        assert (stack.k.shape[3], int(stack.pos.max()) + 1) == (keep, tokens)  # physical and logical length
    assert before / sum(s.k.nbytes + s.v.nbytes for s in stacks_of(tight.cache)) == engine.slots_for(tokens) / keep
    with pytest.raises(ValueError, match="1 tokens more, but the session has room for 0"):
        answer(tight, 8, 1)
    session.evict(8)
    found = answer(session, 8, 4)
    logits = np.asarray(session.logits)
    assert np.isfinite(logits).all()
    assert np.ptp(logits) > 0.5
    assert len(np.unique(found)) >= 2
    assert len(session.tokens[0]) == tokens + 4


KEEP, PART = 32, 16
INTERLEAVED = Eviction(press=SNAP, keep=KEEP, interleaved=True)


def interleaved_by_hand(ids: list[int]):
    """The algorithm in numpy, but for the model and the scores: after each part the best KEEP keys of each head."""
    model, params = load("qwen3")
    zero, slots = model.init_cache(params, 1, SLOTS, chunk=PART, observe=WINDOW)[0], KEEP + PART
    repeats, _, heads, _, width = zero.k.shape
    k, v = np.zeros((2, repeats, 1, heads, slots, width), np.float32)
    pos, recent, shift, lists = np.full(k.shape[:4], -1, np.int32), zero.recent_q, 0, None
    tokens, at = engine.left_pad([ids], PART)
    score = jax.jit(SNAP)
    for i in range(0, tokens.shape[1], PART):
        if (newest := pos.max()) >= KEEP:
            observed = np.array([newest - np.arange(WINDOW)[::-1] >= 0])
            scores = [score(recent[r], k[r], v[r], pos[r], observed) for r in range(repeats)]
            lists = np.sort(np.argsort(-np.array(scores), axis=-1, kind="stable")[..., :KEEP], axis=-1)
            spare = ((0, 0), (0, 0), (0, 0), (0, PART))
            k, v = (np.pad(np.take_along_axis(a, lists[..., None], 3), (*spare, (0, 0))) for a in (k, v))
            pos = np.pad(np.take_along_axis(pos, lists, 3), spare, constant_values=-1)
            shift = newest + 1 - KEEP
        arrays = (jnp.asarray(a) for a in (k, v, pos))
        held = KVCache(*arrays, shift=jnp.array([shift], jnp.int32), recent_q=recent)
        t, p = tokens[:, i : i + PART], at[:, i : i + PART]
        logits, (held,) = engine.prefill(model, params, t, p, (held,), chunk=PART)
        k, v, pos, recent = np.asarray(held.k), np.asarray(held.v), np.asarray(held.pos), held.recent_q
    return np.asarray(logits), (k, v, pos), lists


def test_interleaved_eviction_is_the_loop_written_out_and_never_takes_more():
    model, params = load("qwen3")
    ids, sizes = prompt(100, 7), []
    session = Session(model, params, ctx=SLOTS, chunk=PART, eviction=INTERLEAVED)
    most = size_bytes(session.cache)
    session.extend([ids], lambda done, total: sizes.append((size_bytes(session.cache), session.cache[0].k.shape[3])))
    assert sizes == [(most, KEEP + PART)] * 7
    logits, arrays, lists = interleaved_by_hand(ids)
    (stack,) = session.cache
    assert_same((stack.k, stack.v, stack.pos), arrays)
    np.testing.assert_array_equal(session.kept[0], lists)
    np.testing.assert_array_equal(session.logits, logits)
    # What an early part did not look at is gone: it is not what an eviction at the end keeps.
    last = Session(model, params, ctx=SLOTS, chunk=PART, eviction=replace(INTERLEAVED, interleaved=False))
    last.extend([ids])
    one, other = (np.sort(s.evicted(0).cache[0].pos) for s in (session, last))
    assert one.shape == other.shape == (3, 1, 2, KEEP)
    assert (one != other).any()
    assert np.abs(np.asarray(session.logits) - np.asarray(last.logits)).max() > 1e-3


def test_a_prompt_within_one_part_is_evicted_from_at_the_end_all_the_same():
    model, params = load("qwen3")
    found = []
    for interleaved in (True, False):
        eviction = replace(INTERLEAVED, interleaved=interleaved)
        session = Session(model, params, ctx=SLOTS, chunk=64, eviction=eviction)
        session.extend([prompt(50, 8)])
        session.evict(8)
        found.append((session.logits, session.cache, session.kept))
    assert found[0][2] is not None
    assert_same(*found)


def test_an_answer_to_a_prompt_that_fits_has_room_as_well():
    """The slots that interleaving leaves after a short prompt are no room for a longer answer."""
    model, params = load("qwen3")
    plain = Session(model, params, ctx=SLOTS, chunk=PART)
    session = Session(model, params, ctx=SLOTS, chunk=PART, eviction=INTERLEAVED)
    for one in (plain, session):
        one.extend([prompt(10, 9)])
    with pytest.raises(ValueError, match="64 tokens more, but the session has room for 38"):
        answer(session, 64, 64)
    session.evict(64)
    np.testing.assert_array_equal(answer(session, 64, 64), answer(plain, 64, 64))


def test_interleaved_budgets_of_each_layer_never_overflow():
    """Layers in caches of their own sizes: the least one is full first."""
    model, params = load("qwen3", expand=True)
    press = PyramidKV(window=4, beta=4)
    session = Session(model, params, ctx=SLOTS, chunk=PART, eviction=replace(INTERLEAVED, press=press))
    assert [s.k.shape[3] for s in stacks_of(session.cache)] == [n + PART for n in press.budgets(KEEP, SLOTS, 3)]
    assert list(press.budgets(KEEP, SLOTS, 3)) == [56, 32, 8]

    def check(done: int, total: int) -> None:
        for stack in stacks_of(session.cache):
            for pos in np.asarray(stack.pos).reshape(-1, stack.pos.shape[3]):
                held = pos[pos >= 0].tolist()
                assert held == sorted(held)
                assert set(range(max(0, done - PART), done)) <= set(held)

    session.extend([prompt(100, 10)], check)
    assert session.kept is not None


def test_an_automatic_budget_that_is_off_and_one_of_all_change_nothing():
    model, params = load("qwen3")
    logits = []
    for eviction in (None, Eviction(press=SNAP), Eviction(press=SNAP, keep=0), replace(INTERLEAVED, keep=300)):
        session = Session(model, params, ctx=SLOTS, chunk=PART, eviction=eviction)
        session.extend([prompt(40, 11)])
        session = session.evicted(8)
        assert session.keep == (300 if eviction and eviction.keep else 0)
        logits.append(np.asarray(session.logits))
    assert_same(logits[:1] * 3, logits[1:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Eviction(keep=-1), "keep=-1 must be 0, for all tokens, or more"),
        (lambda: Eviction(keep=63), "keep=63 is below the 64 tokens that the press looks from"),
        (lambda: Eviction(press=LagKV(), keep=99, interleaved=True), "LagKV .* cannot be interleaved"),
        (lambda: evict(keep=7), "keep=7 is below the 8 tokens that the press looks from"),
        (lambda: evict(tokens=(7, 5)), "the press looks from 8 tokens, but there are 7"),
        (lambda: evict(press=SnapKV(window=9)), "looks from 9 tokens, but the cache has the queries of 8"),
        (lambda: evict(press=LagKV(), twice=True), "LagKV ranks parts of a whole prompt, but some"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    before = jax.tree.map(np.asarray, known("qwen3")[1])
    with pytest.raises(ValueError, match=message):
        make()
    assert_same(known("qwen3")[1], before)


def evict(press: Press = SNAP, keep: int = 40, tokens=(96, 75), twice: bool = False):
    held, params = known("qwen3")[1], load("qwen3")[1]
    if twice:
        held = snapkv.evict(params, held, Eviction(press=Knorm()), keep, tokens, 8).cache
    snapkv.evict(params, held, Eviction(press=press), keep, tokens, 0, done=lambda old: old.k.delete())
