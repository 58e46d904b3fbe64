"""Products against float64 for every weight type, attention against float64 for every way to look at a cache."""

import dataclasses
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from jax import lax
from models import attend, random_blocks

from jaxinfer import cache, ops
from jaxinfer.cache import KVCache
from jaxinfer.gguf import Tensor
from jaxinfer.ops import attention as attention_ops
from jaxinfer.ops import matmul as matmul_ops
from jaxinfer.quants import FORMATS, PLAIN, pack
from jaxinfer.snapkv import compact

pytestmark = pytest.mark.usefixtures("quick_compiler")

ATTENTIONS = {
    "reference": attention_ops.attention_reference,
    "dense": attention_ops.attention_dense,
    "blocks": attention_ops.attention_blocks,
}
every_attention = pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
MATMULS = {"reference": matmul_ops.matmul_reference, "gpu": matmul_ops.matmul_gpu}
every_matmul = pytest.mark.parametrize("matmul", MATMULS.values(), ids=MATMULS)
LAYERS, OUT, INTO = 2, 5, 512


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def stack(kind: GGMLQuantizationType):
    """A weight [LAYERS, OUT, INTO] as it is on the device, and its float64 values by gguf-py."""
    if kind in FORMATS:
        raw = random_blocks(kind, (LAYERS, OUT, INTO), std=INTO**-0.5)
    else:
        raw = quantize(normal(LAYERS, OUT, INTO, seed=1) * np.float32(INTO**-0.5), kind)
    data = np.ascontiguousarray(raw).view(np.uint8).reshape(LAYERS, OUT, -1)
    packed = pack([Tensor(f"blk.{i}", kind, (OUT, INTO), data[i]) for i in range(LAYERS)])
    return jax.tree.map(jnp.asarray, packed), np.float64(dequantize(raw, kind)).reshape(LAYERS, OUT, INTO)


def assert_sum_close(got, x, w: np.ndarray):
    """An f32 sum of n products is off by at most n half units of the sum of their sizes, in whatever order."""
    x = np.asarray(x, np.float64)
    assert got.dtype == jnp.float32
    assert (np.abs(np.float64(got) - x @ w.T) <= INTO * 2.0**-24 * (np.abs(x) @ np.abs(w).T)).all()


@pytest.mark.parametrize("kind", [*PLAIN, *FORMATS], ids=lambda t: t.name)
def test_products_of_every_type_read_from_a_stack_in_a_loop(kind):
    w, values = stack(kind)
    few, many = jnp.asarray(normal(1, 1, INTO)), jnp.asarray(normal(2, 9, INTO, seed=2))

    @jax.jit
    def products(w):
        def body(i, out):
            ys = [f(x, w, i) for f in MATMULS.values() for x in (few, many)]
            return jax.tree.map(lambda all_, y: all_.at[i].set(y), out, ys)

        out = [jnp.zeros((LAYERS, *x.shape[:2], OUT)) for _ in MATMULS for x in (few, many)]
        return lax.fori_loop(0, LAYERS, body, out)

    for got, x in zip(products(w), [few, many] * len(MATMULS), strict=True):
        for layer in range(LAYERS):
            assert_sum_close(got[layer], x, values[layer])


@every_matmul
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q6_K"])
def test_products_by_layer_and_alone(kind, matmul):
    w, values = stack(GGMLQuantizationType[kind])
    xs = [jnp.asarray(normal(b, t, INTO, seed=t)) for b, t in ((1, 1), (1, 8), (1, 9), (4, 2), (3, 3))]
    by_layer, alone = jax.jit(lambda w, one: ([matmul(x, w, 1) for x in xs], [matmul(x, one) for x in xs]))(
        w, jax.tree.map(lambda plane: plane[0], w)
    )
    for x, one, other in zip(xs, by_layer, alone, strict=True):
        assert_sum_close(one, x, values[1])
        assert_sum_close(other, x, values[0])


@pytest.mark.parametrize("size", [matmul_ops.LONG, matmul_ops.LONG + 32])
def test_long_rows(size):
    w, x = normal(3, size), normal(1, 2, size, seed=1)
    got = np.float64(jax.jit(matmul_ops.matmul_gpu)(jnp.asarray(x), jnp.asarray(w)))
    assert (np.abs(got - np.float64(x) @ w.T) <= size * 2.0**-24 * (np.abs(np.float64(x)) @ np.abs(w).T)).all()


@every_matmul
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_K"])
def test_products_of_bf16_sum_in_f32(kind, matmul):
    w, values = stack(GGMLQuantizationType[kind])
    xs = [jnp.asarray(normal(1, t, INTO), jnp.bfloat16) for t in (1, 8, 9, 40)]
    rounded, exact = jax.jit(lambda w: [[matmul(x, w, 1, dtype=d) for x in xs] for d in (None, jnp.float32)])(w)
    for x, y, z in zip(xs, rounded, exact, strict=True):
        assert (y.dtype, z.dtype) == (jnp.bfloat16, jnp.float32)
        want = np.float64(x) @ values[1].T
        # Rounding a weight to bf16 errs by up to 2**-8, by 2**-9 in the mean; so does rounding the result. Sums in
        # bf16 would err by some sqrt(INTO) times as much.
        assert np.linalg.norm(np.float64(y) - want) <= 2**-8 * np.linalg.norm(want)
        assert np.linalg.norm(np.float64(z) - want) <= 2**-8 * np.linalg.norm(want)
        if kind == "BF16":  # exact operands: nothing but f32 sums
            assert_sum_close(z, x, values[1])


def filled(held: np.ndarray, heads: int, width: int, dtype="float32", repeats: int = 2) -> KVCache:
    """A cache whose second layer holds the positions `held` [B, S], with random keys and values even where empty."""
    k, v = (jnp.asarray(normal(repeats, len(held), heads, held.shape[1], width, seed=s), dtype) for s in (3, 4))
    pos = jnp.full((repeats, len(held), heads, held.shape[1]), 10**6).at[1].set(held[:, None])
    return KVCache(k, v, pos)


@partial(jax.jit, static_argnames=("attention", "window", "scale", "aligned", "options"))
def run(attention, q, held: KVCache, pos, window=None, scale=0.3, aligned=False, sinks=None, options=()):
    """On the second layer."""
    return attention(q, held, 1, pos, scale=scale, window=window, aligned=aligned, sinks=sinks, **dict(options))


def wanted(q, held: KVCache, pos, window=None, scale=0.3, aligned=False, sinks=None) -> np.ndarray:
    """A sink is a key that scores so much for every query of its head, with a value of zeros."""
    b, t, *_, width = q.shape
    out = []
    for row in range(b):
        k, v = (np.asarray(a[1, row], np.float64).swapaxes(0, 1) for a in (held.k, held.v))
        slots, queries = np.asarray(held.pos[1, row, 0]), np.asarray(pos)[row][:, None]
        seen = (slots >= 0) & (slots <= queries)
        if window:
            seen &= slots // window == queries // window if aligned else queries - slots < window
        heads = np.asarray(q[row], np.float64).reshape(t, -1, width)
        y = attend(heads, k, v, seen, scale)
        if sinks is not None:
            scores = np.einsum("tnh,snh->tns", heads, np.repeat(k, heads.shape[1] // k.shape[1], 1)) * scale
            total = (np.exp(scores) * seen[:, None]).sum(-1)
            y *= (total / (total + np.exp(np.float64(sinks))))[..., None]
        out.append(y)
    return np.stack(out).reshape(q.shape)


HELD = np.array([[8, 1, 2, 3, 4, -1, 6, 7], [-1, -1, -1, -1, -1, -1, -1, -1], [0, 9, -5, 3, 12, 5, 6, 7]])  # 3 rings
POS = np.array([[-1, 6, 7, 8], [0, 1, 2, 3], [-1, -1, 3, 100]], np.int32)


@every_attention
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("heads", "group"), [(1, 5), (3, 2)])
def test_attention_sees_what_it_should(attention, heads, group, window):
    held, q = filled(HELD, heads, 24), normal(3, 4, heads, group, 24)
    got, want = np.asarray(run(attention, q, held, POS, window)), wanted(q, held, POS, window)
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()  # f32: sums of 24 and of up to 8 terms, and an exp
    blind = ~want.any(axis=(2, 3, 4))
    assert blind.sum() >= 7  # 3 pads, and the row whose cache is empty
    assert not got[blind].any()  # exactly zero, and not nan


@every_attention
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sinks", [None, (-3.0, 0.5, 40.0, -80.0, 1.5, 0.0)], ids=["", "sinks"])
def test_attention_with_sinks_and_with_windows_of_fixed_place(attention, aligned, sinks):
    held, q = filled(HELD, 3, 24), normal(3, 4, 3, 2, 24)
    sinks = None if sinks is None else np.array(sinks, np.float32)
    got = np.asarray(run(attention, q, held, POS, 4, aligned=aligned, sinks=sinks))
    want = wanted(q, held, POS, 4, aligned=aligned, sinks=sinks)
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()  # as above
    assert not got[~want.any(axis=(2, 3, 4))].any()


@every_attention
def test_attention_with_a_soft_cap(attention):
    held, q, cap = filled(HELD, 3, 24), normal(3, 4, 3, 2, 24), 0.5
    got = np.asarray(run(attention, q, held, POS, options=(("softcap", cap),)))
    k, v = (np.float64(a[1]) for a in (held.k, held.v))
    for row, t, head, part in np.ndindex(*q.shape[:4]):
        seen = (HELD[row] >= 0) & (HELD[row] <= POS[row, t])
        weight = np.exp(cap * np.tanh(0.3 * k[row, head] @ np.float64(q[row, t, head, part]) / cap)) * seen
        want = weight @ v[row, head] / max(weight.sum(), 1e-300)
        assert np.abs(got[row, t, head, part] - want).max() <= 1e-6 * np.abs(v).max()  # f32, few terms


@pytest.mark.parametrize("attention", [*ATTENTIONS.values(), attention_ops.attention_tiles], ids=[*ATTENTIONS, "tiles"])
@pytest.mark.parametrize("window", [None, 200])
def test_attention_of_many_queries_to_many_slots(attention, window):
    """More than a tile and a block, and a multiple of neither; a ring that has wrapped, and a short row beside it."""
    slots, t = 2 * attention_ops.BLOCK + 88, attention_ops.TILE + 22
    ring, ends = np.arange(slots), (slots + 300, 170)
    held = np.stack([ring + (ring <= 300) * slots, np.where(ring <= 170, ring, -1)])
    pos = np.array(ends, np.int32)[:, None] + np.arange(1 - t, 1, dtype=np.int32)
    pos[1, :40] = -1
    cached, q = filled(held, 2, 16), normal(2, t, 2, 1, 16)
    got, want = np.asarray(run(attention, q, cached, pos, window)), wanted(q, cached, pos, window)
    assert np.abs(got - want).max() <= 5e-6 * np.abs(want).max()  # f32: sums of up to 600 terms
    assert not got[1, :40].any()


@pytest.mark.parametrize("window", [None, 1, 5, 12])
def test_blocks_that_no_query_needs_are_not_visited(window):
    rng = np.random.default_rng(0)
    for share in np.repeat([0.5, 0.05], 30):
        held = np.full((2, 3, 22), -1, np.int32)
        for row in range(2):  # positions up to a last one in a ring, of which each head has lost some
            end = rng.integers(0, 60)
            kept = np.arange(max(0, end - 21), end + 1)
            held[row][:, kept % 22] = np.where(rng.random((3, len(kept))) < share, kept, -1)
        pos = np.maximum(rng.integers(0, 60, (2, 1)) + np.arange(-3, 1), -1).astype(np.int32)
        order, count = attention_ops.live_blocks(jnp.asarray(pos), jnp.asarray(held), 4, window)
        age = pos[:, None, :, None] - held[:, :, None, :]
        seen = (held[:, :, None, :] >= 0) & (age >= 0) & (age < (window or 99)) & (pos[:, None, :, None] >= 0)
        needed = {int(slot) // 4 for slot in np.flatnonzero(seen.any((0, 1, 2)))}
        visited = order[:count].tolist()
        assert needed <= set(visited)
        assert visited == sorted(visited)
        used = {int(slot) // 4 for slot in np.flatnonzero((held >= 0).any((0, 1)))}
        assert set(visited) <= used


@every_attention
def test_attention_in_bf16(attention):
    held, q = filled(HELD, 2, 64, "bfloat16"), jnp.asarray(normal(3, 4, 2, 3, 64), "bfloat16")
    got, want = np.asarray(run(attention, q, held, POS), np.float64), wanted(q, held, POS)
    # scaled queries, weights and result are rounded to bf16, by up to 2**-8 each and by half of it in the mean
    assert np.linalg.norm(got - want) <= 2**-7 * np.linalg.norm(want)


@every_attention
def test_attention_of_bf16_queries_to_an_f32_cache_has_the_queries_type(attention):
    q = jnp.asarray(normal(3, 4, 1, 2, 24), "bfloat16")
    assert run(attention, q, filled(HELD, 1, 24), POS).dtype == jnp.bfloat16


@every_attention
def test_attention_of_huge_logits(attention):
    held, q = filled(HELD, 1, 8), normal(3, 4, 1, 2, 8) * np.float32(1e30)
    got = np.asarray(run(attention, q, held, POS, scale=1.0))
    assert np.isfinite(got).all()
    want = wanted(q, held, POS, scale=1.0)  # one key takes it all: its value comes out, rounded once
    np.testing.assert_allclose(got, want, rtol=2.0**-23)


@every_attention
def test_attention_to_equal_keys_is_their_mean_and_to_one_key_its_value(attention):
    held = filled(HELD, 1, 8)
    alike = KVCache(jnp.ones_like(held.k), held.v, held.pos)
    got = np.asarray(run(attention, normal(3, 4, 1, 1, 8), alike, POS))
    np.testing.assert_allclose(got[0, 3, 0, 0], np.asarray(held.v)[1, 0, 0, HELD[0] >= 0].mean(0), atol=1e-6)
    one = np.asarray(run(attention, normal(3, 4, 1, 1, 8), held, POS, window=1))
    np.testing.assert_allclose(one[0, 2, 0, 0], held.v[1, 0, 0, 7], rtol=2.0**-23)


@every_attention
def test_attention_of_a_row_depends_on_no_other_row(attention):
    held, q = filled(HELD, 2, 24), normal(3, 4, 2, 2, 24)
    whole = run(attention, q, held, POS)
    for row in range(3):
        others = np.arange(3) != row
        changed = KVCache(
            held.k.at[:, others].multiply(1e20), held.v.at[:, others].add(-3), held.pos.at[:, others].set(2)
        )
        np.testing.assert_array_equal(run(attention, q, changed, POS)[row], whole[row])


@every_attention
def test_attention_does_not_depend_on_the_order_of_slots(attention):
    held, q = filled(HELD, 2, 24), normal(3, 4, 2, 2, 24)
    order = np.random.default_rng(0).permutation(8)
    moved = KVCache(held.k[..., order, :], held.v[..., order, :], held.pos[..., order])
    got, want = run(attention, q, moved, POS, window=5), run(attention, q, held, POS, window=5)
    np.testing.assert_allclose(got, want, atol=1e-6)  # sums of 8 terms of about 1, in another order
    if attention is attention_ops.attention_reference:
        np.testing.assert_array_equal(got, want)


@every_attention
def test_attention_to_the_oldest_key_of_a_window_alone(attention):
    """It has by far the largest logit, but for the key before it."""
    window, pos, ring = 7, np.array([[20, 21]], np.int32), np.arange(16)
    held = filled((ring + (ring < 6) * 16)[None], 1, 8)  # positions 6 to 21
    q = normal(1, 2, 1, 1, 8, seed=7)
    for t in range(2):
        one = KVCache(*(x.at[1, 0, 0, (pos[0, t] - window) % 16].multiply(0) for x in (held.k, held.v)), held.pos)
        for older, size in ((1, 400), (0, 200)):
            slot = (pos[0, t] - window + 1 - older) % 16
            one = dataclasses.replace(one, k=one.k.at[1, 0, 0, slot].set(size * np.sign(q[0, t, 0, 0])))
        got = run(attention, q, one, pos, window)
        np.testing.assert_allclose(got[0, t, 0, 0], one.v[1, 0, 0, slot], rtol=2.0**-22)  # e**-100 is next


def test_the_reference_computes_in_f32_and_rounds_once():
    held, q = filled(HELD, 2, 64, "bfloat16"), jnp.asarray(normal(3, 4, 2, 3, 64), "bfloat16")
    got, want = np.asarray(run(attention_ops.attention_reference, q, held, POS), np.float64), wanted(q, held, POS)
    assert (np.abs(got - want) <= 2.0**-8 * np.abs(want) + 1e-6).all()  # half a unit of bf16, and the f32 before it


def read(held: KVCache, pos: np.ndarray, seed: int, window: int | None = None, dtype="float32"):
    """Writes keys and values, alike for equal positions and seeds, to the second layer; what the tokens then see."""
    b, t, heads, width = *pos.shape, held.k.shape[2], held.k.shape[4]
    k, v, q = (jnp.asarray(normal(b, t, heads, n * width, seed=seed + s), dtype) for s, n in enumerate((1, 1, 2)))
    held = write(held, 1, k, v, pos)
    q = q.reshape(b, t, heads, 2, width)
    return held, np.asarray(run(attention_ops.attention_reference, q, held, pos, window))


write = jax.jit(cache.write)


@pytest.mark.parametrize(
    ("window", "chunk", "tokens", "dtype"),
    [
        (5, 3, 40, "bfloat16"),
        (16, 1, 40, "float32"),
        (16, 16, 100, "bfloat16"),
        (40, 130, 400, "float32"),
    ],
)
def test_a_ring_is_a_full_cache_with_a_window_bit_for_bit(window, chunk, tokens, dtype):
    """Of two rows, of which one is 2 tokens shorter; the ring has no slot to spare."""
    ring, full = (cache.empty(2, 2, 2, slots, 16, dtype) for slots in (window + chunk - 1, tokens + chunk))
    for start in range(0, tokens, chunk):
        pos = start + np.arange(chunk, dtype=np.int32) - np.array([[0], [2]], np.int32)
        (ring, got), (full, want) = (read(held, pos, start, window, dtype) for held in (ring, full))
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(want.any(axis=(2, 3, 4)), pos >= 0)
    assert tokens > 2 * ring.k.shape[3] or chunk == 130  # it has wrapped
    assert (np.asarray(ring.pos)[1, 0] >= ring.k.shape[3]).all()


@pytest.mark.parametrize(
    ("name", "t", "window", "aligned"),
    [
        *((name, *case) for name in ("reference", "blocks") for case in ((1, 128, True), (140, 100, False))),
        ("blocks", 1, None, False),  # of the reference: below
    ],
)
def test_skipping_changes_no_bit(name, t, window, aligned):
    """Slots that no query sees hold nan, so that visiting one of them shows."""
    attention = ATTENTIONS[name]
    slots, end = 5 * attention_ops.BLOCK, 4 * attention_ops.BLOCK - 20
    held, q = filled(np.arange(slots)[None], 2, 16), normal(1, t, 2, 2, 16)
    held = dataclasses.replace(held, pos=held.pos.at[1, :, :, 256:512].set(-1))  # a hole
    pos = np.arange(end - t, end, dtype=np.int32)[None]
    sinks = normal(4)
    got, want = (run(attention, q, held, pos, window, 0.3, aligned, sinks, (("skip", s),)) for s in (True, False))
    np.testing.assert_array_equal(got, want)
    needless = np.r_[256:512, 1024:slots] if window is None else np.r_[0:512, 1024:slots]
    poisoned = dataclasses.replace(held, v=held.v.at[:, :, :, needless].set(jnp.nan))
    np.testing.assert_array_equal(run(attention, q, poisoned, pos, window, 0.3, aligned, sinks), want)
    assert np.isnan(run(attention, q, poisoned, pos, window, 0.3, aligned, sinks, (("skip", False),))).all()


live_keys = jax.jit(attention_ops.live_keys, static_argnums=(2, 3))


def test_the_keys_that_the_reference_visits_are_those_between_the_first_and_the_last_that_a_query_sees():
    rng = np.random.default_rng(0)
    for window, aligned in ((None, False), (1, False), (5, False), (12, False), (5, True)) * 12:
        kept = [np.flatnonzero(rng.random(60) < 0.3) for _ in range(6)]
        held = np.full((6, 60), -1, np.int32)
        for row, positions in zip(held, kept, strict=True):
            row[rng.permutation(60)[: len(positions)]] = positions
        pos = np.maximum(rng.integers(0, 60, (2, 1)) + np.arange(-3, 1), -1).astype(np.int32)
        pos[0, :] = -1 if rng.random() < 0.1 else pos[0, :]
        found = live_keys(pos, held.reshape(2, 3, 60), window, aligned)
        order, places, first, count = map(np.asarray, found)
        for i, (b, head) in enumerate(np.ndindex(2, 3)):
            queries = pos[b][pos[b] >= 0]
            oldest = 0 if window is None else queries // window * window if aligned else queries - window + 1
            seen = kept[i][(kept[i] >= np.min(oldest, initial=99)) & (kept[i] <= max(queries, default=-1))]
            visited = slice(first[b, head], first[b, head] + max(count[b, head], 0))
            np.testing.assert_array_equal(places[b, head][visited], seen)
            np.testing.assert_array_equal(held[i][order[b, head][visited]], seen)


@pytest.mark.parametrize("heads", [1, 2], ids=["one list", "lists of heads"])
def test_a_compacted_cache_is_a_full_one_whose_evicted_slots_are_empty_bit_for_bit(heads):
    tokens, keep, more, rng = 60, 23, 12, np.random.default_rng(0)
    full = cache.empty(2, 2, 2, tokens + more, 16, "float32")
    full, _ = read(full, np.arange(tokens, dtype=np.int32)[None] - np.array([[0], [5]], np.int32), 0)
    lists = np.empty((2, 2, heads, keep), np.int32)
    held = np.full((2, 2, heads, tokens + more), -1, np.int32)
    for where in np.ndindex(2, 2, heads):  # slots are positions
        n = keep - where[1]  # the second row's lists are one shorter, and end past the cache
        lists[where] = np.r_[np.sort(rng.choice(tokens - 5 * where[1], n, replace=False)), [99] * (keep - n)]
        held[where][lists[where][:n]] = lists[where][:n]
    small, masked = compact(full, jnp.asarray(lists), more), dataclasses.replace(full, pos=jnp.asarray(held))
    assert small.k.shape[3] == keep + more
    for start in range(0, more, 3):
        pos = tokens + start + np.arange(3, dtype=np.int32) - np.array([[0], [5]], np.int32)
        (small, got), (masked, want) = (read(one, pos, start + 1) for one in (small, masked))
        np.testing.assert_array_equal(got, want)
        assert got.all()
    full, everything = read(full, pos, start + 1)
    assert np.abs(everything - want).max() > 1e-2  # what was evicted would have counted


@pytest.mark.parametrize(
    ("capability", "dtype", "attention"),
    [
        ("9.0", "bfloat16", "attention_hopper"),
        ("9.0", "float32", "attention_tiles"),
        ("8.9", "float16", "attention_ampere"),
        ("12.0", "bfloat16", "attention_ampere"),
        ("7.5", "float16", "attention_tiles"),
    ],
)
def test_default_ops_of_a_gpu(capability, dtype, attention):
    device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    chosen = ops.default_ops(device, np.dtype(dtype)).attention
    assert getattr(chosen, "func", chosen).__name__ == attention
    # Pipelines of sm_90 and later need a fence that there is not before.
    assert getattr(chosen, "keywords", {}) == ({"hopper": True} if capability == "12.0" else {})


def test_default_ops_of_a_cpu_are_its_own_whatever_the_type():
    for dtype in ("float32", "bfloat16"):
        assert ops.default_ops(jax.devices("cpu")[0], np.dtype(dtype)) == ops.CPU


@pytest.mark.gpu
@pytest.mark.parametrize("width", [10, 32, 320])
def test_a_gpu_takes_heads_of_any_width(width):
    """Also those that the kernels do not: no multiples of 16."""
    held, pos = filled(np.arange(16)[None], 2, width, "bfloat16"), np.arange(16, dtype=np.int32)[None]
    q = jnp.asarray(normal(1, 16, 2, 3, width), "bfloat16")
    attention = ops.default_ops(jax.devices("gpu")[0], np.dtype(jnp.bfloat16)).attention
    got, want = (np.asarray(run(f, q, held, pos), np.float64) for f in (attention, attention_ops.attention_reference))
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)  # as above
