"""Votes by Hopper's kernels against float64: interpreted, lowered and compiled without a GPU, and on one."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest

from jaxinfer import snapkv
from jaxinfer.cache import KVCache
from jaxinfer.ops.votes import votes_hopper, votes_reference
from jaxinfer.pallas.votes import SPAN, votes
from jaxinfer.presses import TOVA, SnapKV

LAYER = 1
interpreted = jax.jit(partial(votes, interpret=True))

pytestmark = pytest.mark.usefixtures("quick_compiler")


def inputs(held: np.ndarray, *, window=8, heads=1, group=2, width=64, dtype="bfloat16", sinks=False, size=2.0) -> tuple:
    """For keys at positions [B, P, S]; empty slots, padding and other layers hold noise. Logits have this deviation."""
    rng = np.random.default_rng(0)
    batch, _, slots = held.shape
    queries = rng.normal(size=(batch, window, heads, group, width)).astype(np.float32) * size / width**0.5
    k = jnp.asarray(rng.normal(size=(2, batch, heads, slots, width)), dtype)
    valid = held.max((1, 2))[:, None] - np.arange(window)[::-1] >= 0
    sink = jnp.asarray(rng.normal(size=heads * group), jnp.float32) if sinks else None
    return jnp.asarray(queries), jnp.asarray(valid), k, jnp.int32(LAYER), jnp.asarray(held, jnp.int32), sink


def full(slots: int, *tokens: int) -> np.ndarray:
    """Positions in the slots [B, 1, S] of rows of so many tokens."""
    return np.where(np.arange(slots) < np.array(tokens)[:, None], np.arange(slots), -1)[:, None]


def gaps(slots: int, heads: int, tokens: int, last: int) -> np.ndarray:
    """Positions [1, K, S] where each head kept some of the tokens, and all of the last ones."""
    rng, held = np.random.default_rng(1), np.full((1, heads, slots), -1)
    for head, one in enumerate(held[0]):
        kept = np.sort(rng.choice(tokens - last, slots - last - 3 - head, replace=False))
        one[: len(kept) + last] = [*kept, *range(tokens - last, tokens)]
    return held


def wanted(queries, valid, k, layer, pos, sinks) -> np.ndarray:
    """The definition in float64."""
    (_, window, heads, group, _), slots = queries.shape, k.shape[3]
    q, k, pos = np.asarray(queries, np.float64), np.asarray(k, np.float64)[layer], np.asarray(pos)
    valid, sinks = np.asarray(valid), None if sinks is None else np.asarray(sinks)
    out = np.zeros((len(q), heads, group, slots))
    for b, head, g in np.ndindex(out.shape[:3]):
        held = pos[b, head % pos.shape[1]]
        sink = -np.inf if sinks is None else float(sinks[head * group + g])
        for w in np.flatnonzero(valid[b]):
            seen = (held >= 0) & (held <= pos[b].max() - window + 1 + w)
            s = np.where(seen, k[b, head] @ q[b, w, head, g], -np.inf)
            e = np.exp(s - max(s.max(), sink))
            out[b, head, g] += e / (e.sum() + np.exp(sink - max(s.max(), sink)))
    return out


def check(got: Any, args: tuple, rtol: float) -> None:
    want = wanted(*args)
    np.testing.assert_allclose(np.asarray(got), want, rtol=rtol, atol=1e-7)
    assert want.max() > 0.3  # of some: logits differ
    assert (np.asarray(got)[want == 0] == 0).all()


# A weight's relative error is its logit's absolute one, of a sum of products that each have the error of q's two parts:
# 2^-17 for bf16, of logits up to 10. For f16 the errors of f32 itself are larger.
RTOL = {"bfloat16": 4e-5, "float16": 1e-5}
CASES = {
    "rows": (full(SPAN + 70, SPAN + 60, 5), {"group": 3, "window": 12}),  # two spans; shorter than the window
    "snapkv": (full(256, 250), {"group": 4, "window": 64, "width": 128, "sinks": True}),
    "gaps": (gaps(200, 2, 400, 16), {"heads": 2, "width": 80, "dtype": "float16"}),
    "tiles": (full(130, 129), {"group": 3, "window": 60, "width": 256}),  # two tiles of heads, one of them padded
    "wide": (full(130, 100), {"window": 1, "width": 512}),
}


@pytest.mark.parametrize("case", CASES)
def test_kernels_against_float64(case: str):
    held, options = CASES[case]
    args = inputs(held, **options)
    check(mosaic.interpret(interpreted, *args), args, RTOL[args[2].dtype.name])


def test_adversarial_logits():
    """Constant keys, a query of zeros, logits of 2000 and one visible key: shares are still shares."""
    queries, valid, k, layer, pos, _ = inputs(full(140, 131), width=64, window=8, size=400.0)
    queries = queries.at[:, 0].set(0)
    k = k.at[:, :, :, :100].set(1)
    args = queries, valid, k, layer, pos, jnp.asarray([-1e4, 1e4], jnp.float32)
    got = np.asarray(mosaic.interpret(interpreted, *args))
    assert np.isfinite(got).all()
    # Logits of 2000 have errors of 2000 * 2^-17 = 0.02 and that share of their weights.
    np.testing.assert_allclose(got, wanted(*args), rtol=0.05, atol=0.05)
    np.testing.assert_allclose(got[:, :, 0].sum(-1), 8, rtol=1e-3)  # the error of a query's sum, in both passes alike
    assert not got[:, :, 1].any()  # all share to the sink
    one, low = jnp.asarray(np.where(pos == 3, 3, -1), jnp.int32), jnp.asarray([-np.inf] * 2, jnp.float32)
    assert not np.asarray(mosaic.interpret(interpreted, queries, valid & False, k, layer, one, low)).any()
    got = mosaic.interpret(interpreted, queries, valid, k, layer, one, low)
    want = np.broadcast_to(np.arange(140) == 3, (2, 140))  # by the last query: the others are before it
    np.testing.assert_array_equal(np.asarray(got)[0, 0], want)


@pytest.mark.parametrize("press", [SnapKV(window=8), TOVA()], ids=lambda press: type(press).__name__)
def test_presses_take_the_votes_of_each_layer_of_a_stack(press):
    queries, _, k, _, pos, _ = inputs(full(128, 120), heads=1)
    cache = KVCache(k, k, jnp.stack([pos, pos]), recent_q=jnp.stack([queries, -queries]))
    sinks = jnp.array([[0.0, 1.0], [2.0, -1.0]])
    want = snapkv._scores(press, cache, sinks, votes=votes_reference)
    got = mosaic.interpret(snapkv._scores, press, cache, sinks, votes=partial(votes, interpret=True))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    where = np.isfinite(want)
    np.testing.assert_allclose(np.asarray(got)[where], np.asarray(want)[where], rtol=RTOL["bfloat16"], atol=1e-7)
    assert not np.allclose(np.asarray(want)[0][where[0]], np.asarray(want)[1][where[1]], rtol=0.1)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": "float32"}, "keys of float32 are neither bfloat16 nor float16"),
        ({"width": 72}, "heads of 72 are neither a multiple of 16 up to 256 nor 512"),
        ({"width": 384}, "heads of 384 are neither"),
        ({"width": 512, "window": 65}, "a window of 65 queries is over 64, of heads of 512"),
    ],
)
def test_what_the_kernels_do_not_take_is_the_reference_and_says_so(options, why):
    args = inputs(full(96, 90), **options)
    with pytest.raises(NotImplementedError, match=f"votes: {why}"):
        votes(*args)
    program = jax.jit(lambda *x: votes_hopper(*x)).trace(*args).lower()
    assert f"[all keys of a head at once; {why}" in program.as_text(debug_info=True)
    np.testing.assert_array_equal(program.compile()(*args), jax.jit(lambda *x: votes_reference(*x))(*args))


def shapes(window: int, heads: int, group: int, width: int, slots: int, dtype: str, batch: int = 1) -> tuple:
    def one(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    queries, valid = one(batch, window, heads, group, width, dtype=jnp.float32), one(batch, window, dtype=bool)
    k, sinks = one(36, batch, heads, slots, width, dtype=dtype), one(heads * group, dtype=jnp.float32)
    return queries, valid, k, one(), one(batch, 1, slots), sinks


def programs(arch: tuple[int, int]) -> Iterator[mosaic.Program]:
    """Qwen3-8B, one with 7 queries a head, GPT-OSS, Qwen3.6, Gemma 4 31B's global layers; TOVA, and other windows."""
    assert arch == (9, 0)
    for window, heads, group, width, dtype in [
        (64, 8, 4, 128, "bfloat16"),
        (64, 4, 7, 128, "float16"),
        (64, 8, 8, 64, "bfloat16"),
        (64, 2, 8, 256, "bfloat16"),
        (64, 4, 8, 512, "bfloat16"),
        (64, 8, 1, 80, "bfloat16"),
        (1, 8, 4, 128, "bfloat16"),
        (32, 8, 5, 96, "bfloat16"),
        (250, 8, 2, 128, "bfloat16"),
    ]:
        yield f"{window} {group} {width} {dtype}", votes, shapes(window, heads, group, width, 4352, dtype)


PROGRAMS = list(programs((9, 0)))


@pytest.mark.parametrize("program", PROGRAMS[1:6] + PROGRAMS[8:], ids=lambda program: program[0])
def test_lowers_for_hopper(program):
    """Each width but 96, either type, and the most queries; windows of one are interpreted above."""
    _, f, args = program
    assert mosaic.lower(f, *args, arch=(9, 0)).count("mosaic_gpu_v2") == 2


@mosaic.needs_ptxas
def test_compiles_without_spills():
    found = mosaic.ptxas("test_votes", (9, 0))
    assert found.keys() == {name for name, _, _ in PROGRAMS}
    assert not {name: spilled for name, (_, spilled) in found.items() if spilled}


LARGE = [(64, 8, 4, 128, 16384), (64, 2, 8, 256, 8192), (64, 4, 8, 512, 4096), (64, 8, 8, 64, 131072)]


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "heads", "group", "width", "slots"), LARGE)
def test_on_a_gpu(window: int, heads: int, group: int, width: int, slots: int):
    """A ragged batch of real size against the reference in f32, which is within 1e-6 of float64 (see above)."""
    options = {"window": window, "heads": heads, "group": group, "width": width}
    args = inputs(full(slots, slots - 3, slots // 3), sinks=True, **options)
    kernel = jax.jit(votes)
    got = kernel(*args)
    want = jax.jit(votes_reference)(*args)
    np.testing.assert_allclose(got, want, rtol=RTOL["bfloat16"], atol=1e-7)
    np.testing.assert_array_equal(kernel(*args), got)
    for row in range(2):
        queries, valid, k, layer, pos, sinks = args
        alone = kernel(
            queries[row : row + 1], valid[row : row + 1], k[:, row : row + 1], layer, pos[row : row + 1], sinks
        )
        np.testing.assert_array_equal(alone[0], got[row])


@pytest.mark.gpu
def test_a_gpu_keeps_what_the_reference_does():
    """The same lists, but for scores that are closer to the last one kept than both ways' error."""
    held = np.broadcast_to(full(16384, 16000), (2, 1, 1, 16384))
    queries, _, k, _, _, _ = inputs(held[0], window=64, heads=8, group=4, width=128)
    cache = KVCache(k, k, jnp.asarray(held, jnp.int32), recent_q=jnp.stack([queries, -queries]))
    scores = [np.asarray(snapkv._scores(SnapKV(), cache, None, votes=f)) for f in (votes_hopper, votes_reference)]
    lists = [np.asarray(snapkv.select_jit(x, keep=2048)) for x in scores]
    for index in np.ndindex(scores[1].shape[:3]):
        want = scores[1][index]
        least = np.sort(want)[-2048]
        kept, other = (set(one[index].tolist()) for one in lists)
        assert all(abs(want[slot] / least - 1) < 2 * RTOL["bfloat16"] for slot in kept ^ other)
        assert len(kept ^ other) < 20
