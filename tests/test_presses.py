"""Presses against their authors' own results and plain NumPy; the list that is kept; the cache that it makes."""

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer import presses
from jaxinfer.cache import KVCache, empty, write
from jaxinfer.layers.rope import Rope, frequencies, rope
from jaxinfer.ops.attention import attention_reference
from jaxinfer.presses import (
    TOVA,
    ChunkKV,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    LagKV,
    Press,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    Votes,
)
from jaxinfer.snapkv import compact, select

pytestmark = pytest.mark.usefixtures("quick_compiler")

DATA = Path(__file__).parent / "data" / "presses"
ENTRIES = [
    pytest.param(path, method, id=f"{path.stem}-{method['id']}")
    for path in sorted(DATA.glob("*.npz"))
    for method in json.loads(str(np.load(path)["meta"]))["methods"]
]

score = jax.jit(lambda press, *inputs: press(*inputs), static_argnums=0)
expected_scores = jax.jit(presses.expected_scores, static_argnames="first")
one_list = jax.jit(presses.one_list, static_argnames="recent")
select_jit = jax.jit(select, static_argnames="keep")
attend = jax.jit(attention_reference, static_argnames="scale")
compact_jit = jax.jit(compact, static_argnames="room")


@cache
def golden(path: Path) -> dict[str, np.ndarray]:
    """A case's arrays; inputs in f32 with an axis of layers in front."""
    with np.load(path) as file:
        arrays = dict(file)
    layered = json.loads(str(arrays["meta"]))["layers"] is not None
    for name in {"q", "k", "v", "ea.mu", "ea.cov", "ea.q_pre"} & arrays.keys():
        arrays[name] = arrays[name].astype(np.float32)[() if layered else None]
    return arrays


def grouped(q: np.ndarray, kv_heads: int, scale: float) -> np.ndarray:
    """Queries [B, W, N, H] as a press takes them."""
    return (q * np.float32(scale)).reshape(*q.shape[:2], kv_heads, -1, q.shape[-1])


def press_of(kind: str, p: dict) -> Press:
    snapkv = {"window": p.get("window"), "kernel": p.get("kernel")}
    snapkv["pooling"] = {"avg": "average", "max": "max"}.get(p.get("pooling"))
    return {
        "kvpress-snapkv": lambda: SnapKV(**snapkv),
        "paper-snapkv": lambda: SnapKV(**snapkv),
        "kvpress-pyramidkv": lambda: PyramidKV(**snapkv, beta=p["beta"]),
        "kvpress-chunkkv": lambda: ChunkKV(**snapkv, chunk=p["chunk"]),
        "kvpress-tova": TOVA,
        "kvpress-knorm": Knorm,
        "kvpress-keydiff": KeyDiff,
        "kvpress-streaming": lambda: StreamingLLM(first=p["n_sink"]),
        "kvpress-lagkv": lambda: LagKV(lag=p["lag"], first=p["n_sink"]),
        "global-list": lambda: Votes(window=p["window"]),
    }[kind]()


def scores_of(arrays: dict[str, np.ndarray], kind: str, p: dict) -> np.ndarray:
    """The scores of every layer, [L, B, K, S]."""
    layers = []
    for layer, (q, k, v) in enumerate(zip(arrays["q"], arrays["k"], arrays["v"], strict=True)):
        if kind == "paper-snapkv":  # expands keys and values to the query heads first
            k, v = (np.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))
        pos = np.broadcast_to(arrays["pos"], (len(k), 1, k.shape[2]))
        if kind == "kvpress-expected":
            mean = grouped(arrays["ea.mu"][layer][:, None], k.shape[1], arrays["scale"])[:, 0]
            covariance = arrays["ea.cov"][layer].reshape(*mean.shape, -1) * np.float32(arrays["scale"] ** 2)
            layers.append(expected_scores(mean, covariance, k, v, pos, first=p["n_sink"]))
        else:
            inputs = grouped(q, k.shape[1], arrays["scale"]), k, v, pos, np.ones(q.shape[:2], bool)
            layers.append(score(press_of(kind, p), *inputs))
    return np.asarray(layers)


def stored_lists(arrays: dict[str, np.ndarray], name: str, layers: int) -> list[np.ndarray]:
    """What each layer keeps, [B, rows, n]."""
    keep = arrays.get(name)
    if keep is None:
        return [arrays[f"{name}.layer{layer}"] for layer in range(layers)]
    return list(keep) if keep.ndim == 4 else [keep.reshape(len(keep), -1, keep.shape[-1])]


@pytest.mark.parametrize(("path", "method"), ENTRIES)
def test_scores_and_lists_equal_the_originals(path: Path, method: dict):
    arrays, name, kind, p = golden(path), method["id"], method["method"], method["params"]
    tokens = len(arrays["pos"])
    scores = compared = scores_of(arrays, kind, p)
    if kind == "global-list":
        pos = jnp.broadcast_to(arrays["pos"], (scores.shape[1], 1, tokens))
        compared, scores = (np.asarray(one_list(scores, pos, recent=n))[None] for n in (0, p["recency"]))
    elif kind == "paper-snapkv":
        compared = scores * p["window"]  # a sum where kvpress takes a mean
    elif kind == "kvpress-chunkkv":
        compared = scores[:, :, 0, :: p["chunk"]]  # one of each chunk
    if kind != "kvpress-streaming":  # the original's depend on the budget; only their order means anything
        scored = slice(*method["scored"])
        want = arrays[f"{name}.scores"]
        want = want[..., scored] if want.shape[-1] == tokens else want
        # Several times the originals' own distance from float64, see the data's README; a rank may move by one place.
        atol = 1.01 / p["lag"] if kind == "kvpress-lagkv" else 1e-6 * np.abs(want).max()
        np.testing.assert_allclose(compared[..., scored].reshape(want.shape), want, rtol=1e-5, atol=atol)
    for i, budget in enumerate(method["budgets"]):
        lists = stored_lists(arrays, f"{name}.keep{i}", len(scores))
        if kind == "kvpress-pyramidkv":
            budgets = press_of(kind, p).budgets(tokens * (1 - budget["ratio"]), tokens, len(scores))
            assert budgets == tuple(want.shape[-1] for want in lists)
        for layer, want in zip(scores, lists, strict=True):
            keep = np.asarray(select_jit(layer, keep=tokens, count=jnp.full((1, 1), want.shape[-1])))
            keep = keep[..., : want.shape[-1]]
            if budget.get("tied_rows"):  # any choice among equals is right there
                keep, want = (np.sort(np.take_along_axis(layer, a, axis=-1)) for a in (keep, want))
            np.testing.assert_array_equal(keep, np.broadcast_to(want, keep.shape))


def test_expected_attention_from_queries():
    """The rotation, the statistics and the whole press, whose window is here the prompt, as the original's is."""
    arrays = golden(DATA / "batch.npz")
    q, k, v = (arrays[name][0] for name in ("ea.q_pre", "k", "v"))
    (b, tokens), kv_heads, width = q.shape[:2], k.shape[1], k.shape[3]
    spec = Rope(tuple(frequencies(10000.0, width)), interleaved=False)
    at = jnp.broadcast_to(jnp.arange(tokens), (b, tokens))
    turn = jax.jit(presses.mean_rotation, static_argnums=(0, 1, 3))(spec, width, jnp.full(b, tokens), 512)
    # f32 against f32: angles up to 845 have 3e-5 of error each, which the mean over 512 positions wears down.
    np.testing.assert_allclose(turn, np.broadcast_to(arrays["ea.R"], turn.shape), atol=1e-5)
    mean, covariance = jax.jit(presses.query_statistics)(grouped(q, kv_heads, 1.0), at >= 4)
    mean, covariance = jax.jit(presses.turn_statistics)(mean, covariance, turn)
    for got, name in ((mean, "ea.mu"), (covariance, "ea.cov")):
        want = arrays[name][0].reshape(got.shape)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    press = ExpectedAttention(rope=spec, window=tokens)
    queries = grouped(np.asarray(rope(jnp.asarray(q), at, spec)), kv_heads, arrays["scale"])
    got = score(press, queries, k, v, np.asarray(at)[:, None], np.ones((b, tokens), bool))
    want = arrays["expected.scores"][..., 4:]
    assert np.isposinf(got[..., :4]).all()
    # The angles' error in R moves logits of about 5 by as much as its own 1e-5, and scores by that share.
    np.testing.assert_allclose(got[..., 4:], want, rtol=1e-4, atol=1e-5 * want.max())


TURN = Rope(tuple(frequencies(100.0, 8)), interleaved=True, magnitude=1.25)
BUILT_IN = [
    Votes(window=8),
    SnapKV(window=8, kernel=3),
    SnapKV(window=8, kernel=5, pooling="max"),
    ChunkKV(window=8, chunk=4),
    TOVA(),
    Knorm(),
    KeyDiff(),
    StreamingLLM(),
    LagKV(lag=6, first=3),
    ExpectedAttention(rope=TURN, window=8, future=16),
]


def prompt(tokens: list[int], slots: int, seed: int = 0, window: int = 8, dtype: type = jnp.float32):
    """Inputs of a press for rows of so many tokens. Slots and queries that are none hold noise that is the seed's."""
    rng, noise = np.random.default_rng(7), np.random.default_rng(seed)
    kv_heads, group, width = 2, 3, 8

    def rows(n: int, start: np.ndarray, *shape: int) -> np.ndarray:
        out = noise.normal(size=(len(tokens), n, *shape)) * 9
        for row, count in enumerate(tokens):
            real = rng.normal(size=(40, *shape))[:count]
            at = start[row] + np.arange(count)
            there = (at >= 0) & (at < n)
            out[row, at[there]] = real[there]
        return out

    counts = np.array(tokens)
    q = rows(window, window - counts, kv_heads, group, width)
    k, v = (rows(slots, 0 * counts, kv_heads, width).swapaxes(1, 2) for _ in range(2))
    pos = np.where(np.arange(slots) < counts[:, None], np.arange(slots), -1)[:, None]
    valid = np.arange(window) >= window - counts[:, None]
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(pos, jnp.int32), jnp.asarray(valid)


@pytest.mark.parametrize("press", BUILT_IN, ids=lambda press: type(press).__name__)
def test_a_row_is_scored_as_if_alone(press: Press):
    """Neither other rows, nor what empty slots and padding hold, nor how many there are, change a score."""
    tokens = [33, 5, 18]  # the second is shorter than the window
    inputs = prompt(tokens, 40)
    got = np.asarray(score(press, *inputs))
    np.testing.assert_array_equal(score(press, *prompt(tokens, 40, seed=1)), got)
    assert not np.isnan(got).any()
    np.testing.assert_array_equal(np.isneginf(got), np.broadcast_to(inputs[3] < 0, got.shape))
    for row in (1, 2):
        q, k, v, pos, valid = (x[row : row + 1] for x in inputs)
        alone = score(press, q, k[:, :, :20], v[:, :, :20], pos[..., :20], valid)
        # f32 sums of up to 40 terms in another order; a rank of LagKV could only jump by whole steps of 1/6
        np.testing.assert_allclose(got[row, :, :20], alone[0], rtol=1e-5, atol=1e-6)
    if isinstance(press, SnapKV) and not isinstance(press, ChunkKV):
        last = np.array([min(count, 8) for count in tokens])
        np.testing.assert_array_equal(np.isposinf(got).sum(2), np.broadcast_to(last[:, None], (3, 2)))
    assert press == type(press)(**vars(press))
    assert hash(press) == hash(type(press)(**vars(press)))


@pytest.mark.parametrize(("dtype", "sinks"), [(jnp.float32, None), (jnp.bfloat16, [0.5, -1.0, 2.0, 0.0, 1.0, 3.0])])
def test_attention_received(dtype: type, sinks: list[float] | None):
    """Against float64, over a cache in which each head has positions of its own."""
    q, k, _, _, valid = prompt([30, 3], 12, dtype=dtype)
    pos = np.full((2, 2, 12), -1)
    pos[0, 0, :9] = [0, 3, 4, 11, 22, 24, 27, 28, 29]
    pos[0, 1, 1:12] = [2, 3, 5, 7, 11, 13, 17, 19, 23, 28, 29]
    pos[1, :, :3] = range(3)
    sinks = None if sinks is None else jnp.asarray(sinks, dtype)
    got = jax.jit(presses.attention_received)(q, valid, k, jnp.asarray(pos, jnp.int32), sinks)
    want = np.zeros(got.shape)
    q64, k64 = (np.asarray(x, np.float64) for x in (q, k))
    for b, head, g in np.ndindex(2, 2, 3):
        for w in range(8):
            at = (30, 3)[b] - 8 + w
            seen = (pos[b, head] >= 0) & (pos[b, head] <= at)
            if at >= 0:
                e = np.exp(k64[b, head] @ q64[b, w, head, g]) * seen
                sink = 0 if sinks is None else np.exp(float(sinks[3 * head + g]))
                want[b, head, g] += e / (e.sum() + sink)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # f32 logits of up to 10, so exp within 1e-6


@pytest.mark.parametrize("slots", [2, 20])
def test_lagkv_keeps_what_is_too_short_to_rank(slots: int):
    assert np.isposinf(score(LagKV(lag=16, first=4), *prompt([slots], slots))).all()


def test_presses_refuse():
    for wrong in (partial(SnapKV, kernel=4), partial(SnapKV, window=0), partial(PyramidKV, kernel=0)):
        with pytest.raises(ValueError, match=r"window=\d+ must be at least 1, and kernel=\d odd"):
            wrong()
    with pytest.raises(ValueError, match="8 queries for a window of 9"):
        SnapKV(window=9)(*prompt([12], 12))


def test_budgets():
    assert SnapKV().budgets(100, 1000, 3) == (100, 100, 100)
    assert PyramidKV(window=8, beta=4).budgets(100, 1000, 4) == (175, 125, 75, 25)
    assert PyramidKV(window=8, beta=4).budgets(100, 160, 2) == (152, 48)  # no layer has more before its window
    assert PyramidKV(window=64, beta=20).budgets(100, 1000, 2) == (100, 100)  # the last would be below its window
    assert PyramidKV(window=8, beta=4).budgets(100, 1000, 1) == (175,)


@given(
    rows=st.lists(
        st.lists(st.sampled_from([-np.inf, -1.5, -1.0, 0.0, 0.5, 1.0, np.inf]), min_size=7, max_size=7),
        min_size=4,
        max_size=4,
    ),
    keep=st.integers(1, 7),
    count=st.none() | st.integers(0, 8),
)
def test_select(rows: list[list[float]], keep: int, count: int | None):
    """The best by score, then by slot; ascending; numbers that name no slot at the end."""
    scores = np.array(rows, np.float32).reshape(2, 2, 7)
    got = np.asarray(select_jit(jnp.asarray(scores), keep, None if count is None else jnp.full((2, 1), count)))
    assert got.shape == (2, 2, keep)
    assert (np.diff(got) > 0).all()
    for index in np.ndindex(2, 2):
        order = sorted((-score, slot) for slot, score in enumerate(scores[index]) if score > -np.inf)
        want = sorted(slot for _, slot in order[: keep if count is None else min(keep, count)])
        assert got[index][: len(want)].tolist() == want
        assert (got[index][len(want) :] >= 7).all()


@pytest.mark.parametrize("keep", [0, 8])
def test_select_refuses(keep: int):
    with pytest.raises(ValueError, match=f"keep={keep} must be from 1 to the 7 slots"):
        select(jnp.zeros((1, 7)), keep)


def filled(rows: list[int], slots: int, dtype: type = jnp.float32) -> KVCache:
    """Two layers with two heads, so many tokens in each row, slot p for position p."""
    rng = np.random.default_rng(3)
    k, v = (jnp.asarray(rng.normal(size=(2, len(rows), 2, slots, 4)), dtype) for _ in range(2))
    held = np.where(np.arange(slots) < np.array(rows)[:, None], np.arange(slots), -1)
    return KVCache(k, v, jnp.asarray(np.broadcast_to(held[None, :, None], (2, len(rows), 1, slots)), jnp.int32))


@pytest.mark.parametrize(("heads", "dtype"), [(1, jnp.bfloat16), (2, jnp.float32)])
def test_compact(heads: int, dtype: type):
    """Kept entries lie in order from slot 0, bit for bit, and the rest is empty; attention sees exactly them."""
    rows, slots, n, room = [11, 3], 16, 6, 2
    cache = filled(rows, slots, dtype)
    scores = np.random.default_rng(4).normal(size=(2, 2, heads, slots))
    scores[cache.pos.repeat(heads, 2) < 0] = -np.inf
    keep = select_jit(jnp.asarray(scores, jnp.float32), keep=n)
    got = compact_jit(cache, keep, room=room)
    assert (got.k.shape, got.v.shape, got.pos.shape) == ((2, 2, 2, 8, 4), (2, 2, 2, 8, 4), (2, 2, heads, 8))
    assert (got.k.nbytes, got.v.nbytes) == (cache.k.nbytes // 2, cache.v.nbytes // 2)
    q = np.random.default_rng(5).normal(size=(2, 1, 2, 3, 4))
    pos = jnp.array(rows)[:, None]
    for layer in range(2):
        o = attend(jnp.asarray(q, jnp.float32), got, layer, pos, scale=0.5)
        for row, head in np.ndindex(2, 2):
            kept = np.asarray(keep[layer, row, head % heads])
            kept = kept[kept < slots]
            assert len(kept) == min(rows[row], n)
            want_pos = np.pad(kept, (0, 8 - len(kept)), constant_values=-1)
            np.testing.assert_array_equal(got.pos[layer, row, head % heads], want_pos)
            k, v = (np.asarray(a[layer, row, head])[kept] for a in (cache.k, cache.v))
            for new, old in ((got.k, k), (got.v, v)):
                np.testing.assert_array_equal(new[layer, row, head, : len(kept)], old)
                assert not np.asarray(new[layer, row, head, len(kept) :]).any()
            e = np.exp(q[row, 0, head] @ k.astype(np.float64).T / 2)
            want = e @ v.astype(np.float64) / e.sum(-1, keepdims=True)
            np.testing.assert_allclose(o[row, 0, head], want, rtol=1e-5, atol=1e-6)  # f32, 6 keys


def test_keeping_all_changes_nothing():
    """A row that keeps all of its tokens has them where they were, whatever becomes of the others."""
    cache = filled([9, 4], 12)
    keep = select_jit(jnp.where(cache.pos < 0, -jnp.inf, 1.0), keep=9)
    got = compact_jit(cache, keep, room=3)
    np.testing.assert_array_equal(got.pos, cache.pos)
    for new, old in ((got.k, cache.k), (got.v, cache.v)):
        taken = np.broadcast_to(np.asarray(cache.pos)[..., None] >= 0, old.shape)
        np.testing.assert_array_equal(np.asarray(new)[taken], np.asarray(old)[taken])


def test_compact_refuses_a_ring():
    with pytest.raises(ValueError, match="a ring of 256 slots"):
        compact(empty(1, 1, 2, 4096, 4, jnp.float32, window=64, chunk=32), jnp.zeros((1, 1, 2, 3), jnp.int32), 4)


def test_new_tokens_go_on_behind_those_kept():
    """Twice compacted, and written a chunk at a time with padding: every slot holds what it should, nothing is lost."""
    rows, n, room = [11, 3, 6], 6, 4
    cache = filled(rows, 16)
    for _ in range(2):
        recent = jnp.where(
            cache.pos < 0, -jnp.inf, jnp.asarray(np.random.default_rng(6).normal(size=(2, 3, 2, 1))) * cache.pos
        )
        cache = compact_jit(cache, select_jit(recent, keep=n), room=room)
        np.testing.assert_array_equal(cache.shift, [max(p - n, 0) for p in rows])
        before = np.asarray(cache.pos)
        for count in (3, 1):
            pos = np.array([[-1, *range(p, p + count)] for p in rows])
            new = jnp.asarray(np.random.default_rng(8).normal(size=(3, count + 1, 2, 4)), jnp.float32)
            for layer in range(2):
                cache = jax.jit(write)(cache, layer, new, -new, jnp.asarray(pos, jnp.int32))
            for row, p in enumerate(rows):
                for i in range(count):
                    slot = p - int(cache.shift[row]) + i
                    assert (np.asarray(cache.pos)[:, row, :, slot] == p + i).all()
                    np.testing.assert_array_equal(cache.k[0, row, :, slot], new[row, i + 1])
                    np.testing.assert_array_equal(cache.v[1, row, :, slot], -new[row, i + 1])
            rows = [p + count for p in rows]
        after = np.asarray(cache.pos)
        kept = before >= 0
        np.testing.assert_array_equal(after[kept], before[kept])
        for row, p in enumerate(rows):
            assert (np.sort(after[:, row], axis=-1)[..., -4:] == np.arange(p - 4, p)).all()
            assert ((after[:, row] >= 0).sum(-1) == (before[:, row] >= 0).sum(-1) + 4).all()
            inner = after[:, row]
            assert all((np.diff(x[x >= 0]) > 0).all() for x in inner.reshape(-1, inner.shape[-1]))
