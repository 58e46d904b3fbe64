"""The portable attention kernel against float64: interpreted, lowered and compiled without a GPU, and on one."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from jaxinfer.cache import KVCache
from jaxinfer.pallas.flash_mma import FEW, Blocks, attention_mma, blocks_for, join

LAYER = 1
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # relative error of rounding
ONE = Blocks(rows=16, warps=1, keys=32, stages=2)  # no splits: chunks
SPLIT = Blocks(rows=16, warps=1, keys=32, stages=2, splits=4, least=1)
WIDE = Blocks(rows=32, warps=2, keys=16, stages=3)


def normal(*shape: int, dtype: str = "bfloat16", seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype)))


def full(slots: int, *ends: int) -> np.ndarray:
    """Positions in the slots [B, 1, S] of rows of so many tokens; what was written last, where they wrapped."""
    slot, n = np.arange(slots), np.array(ends)[:, None]
    return np.where(slot < n, slot + (n - 1 - slot) // slots * slots, -1)[:, None]


def evicted(slots: int, heads: int, keep: int, *ends: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions [B, K, S] and shifts where each head kept some of a row's tokens, before the last `new` came."""
    rng, held = np.random.default_rng(1), np.full((len(ends), heads, slots), -1)
    for row, end in enumerate(ends):
        old = end - new
        for one in held[row]:
            kept = np.sort(rng.choice(old, min(keep, old) - 2, replace=False))  # and two slots of the list stay empty
            one[: len(kept)] = kept
            one[min(keep, old) : min(keep, old) + new] = np.arange(old, end)
    return held, np.maximum(np.array(ends, np.int32) - new - keep, 0)


def queries(tokens: int, *ends: int) -> jax.Array:
    """The positions of the last tokens, padding before them where there are fewer."""
    return jnp.asarray(np.maximum(np.array(ends)[:, None] + np.arange(-tokens, 0), -1), jnp.int32)


def cached(held: np.ndarray, heads: int, width: int, dtype: str = "bfloat16", shift: Any = None) -> KVCache:
    """The second layer of a stack holds the positions [B, P, S], and keys and values even where it is empty."""
    k, v = (normal(2, len(held), heads, held.shape[2], width, dtype=dtype, seed=s) for s in (3, 4))
    pos = np.full((2, *held.shape), 5, np.int32)
    pos[LAYER] = held
    return KVCache(k, v, jnp.asarray(pos), shift=None if shift is None else jnp.asarray(shift))


def hard() -> tuple[jax.Array, KVCache, jax.Array, dict[int, int]]:
    """Queries, caches and positions of rows with huge logits of either sign, equal ones, and one visible key.

    Also the slot of that key in the last two rows. The shift says that slots may be empty.
    """
    ends, sizes = (70, 70, 70, 1, 70), np.array([1e18, -1e18, 0, 1e18, 1])
    lone, held = {3: 0, 4: 33}, full(128, *ends)
    held[4, 0, :70] = np.where(np.arange(70) == 33, 33, -1)
    cache = cached(held, 1, 64, shift=np.zeros(len(ends), np.int32))
    q = np.abs(np.random.default_rng(0).normal(size=(len(ends), 1, 1, 2, 64))) * sizes[:, None, None, None, None]
    return jnp.asarray(q.astype(jnp.bfloat16)), replace(cache, k=jnp.abs(cache.k)), queries(1, *ends), lone


def lone_values(cache: KVCache, lone: dict[int, int]) -> np.ndarray:
    """What both heads of these rows see."""
    return np.stack([np.asarray(cache.v)[LAYER, row, [0, 0], slot] for row, slot in lone.items()])


def wanted(
    q: jax.Array, cache: KVCache, pos: jax.Array, *, scale=0.125, window=None, aligned=False, sinks=None, softcap=None
) -> tuple[np.ndarray, np.ndarray]:
    """The softmax of what each query sees, in float64: its mean of values, and of their sizes."""
    k, v = (np.asarray(a, np.float64)[LAYER][:, :, None] for a in (cache.k, cache.v))  # [B, K, 1, S, H]
    held, at = np.asarray(cache.pos)[LAYER][:, :, None, None], np.asarray(pos)[:, None, None, :, None]
    seen = (held >= 0) & (held <= at)  # [B, P, 1, T, S]
    if window is not None:
        seen &= (held // window == at // window) if aligned else (at - held < window)
    s = np.asarray(q, np.float64).transpose(0, 2, 3, 1, 4) @ k.swapaxes(3, 4) * scale  # [B, K, G, T, S]
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    s = np.where(seen, s, -np.inf)
    sink = np.full(s.shape[1:3], -np.inf) if sinks is None else np.asarray(sinks, np.float64).reshape(s.shape[1:3])
    sink = np.broadcast_to(sink[None, :, :, None, None], (*s.shape[:4], 1))
    top = np.maximum(np.maximum(s.max(-1, keepdims=True), sink), -1e300)
    e = np.exp(s - top)
    e /= np.maximum(e.sum(-1, keepdims=True) + np.exp(sink - top), 1e-300)
    return (e @ v).transpose(0, 3, 1, 2, 4), (e @ np.abs(v)).transpose(0, 3, 1, 2, 4)


def check(got: jax.Array, q: jax.Array, cache: KVCache, pos: jax.Array, **options: Any) -> None:
    """Weights and result are rounded to the type, each by a unit at most; the rest is f32, with sums of S terms.

    f16's smallest weights are rounded by 2**-25, of 1 for the largest.
    """
    (want, size), got_f64 = wanted(q, cache, pos, **options), np.asarray(got, np.float64)
    assert got.dtype == q.dtype
    assert got.shape == q.shape
    noise = 2.0**-20 + (
        cache.k.shape[3] * 2.0**-25 * np.abs(np.asarray(cache.v)).max().astype(float) if q.dtype == jnp.float16 else 0
    )
    assert (np.abs(got_f64 - want) <= UNIT[str(q.dtype)] * (size + np.abs(want)) * 1.01 + noise).all()
    blind = ~size.any(axis=4)
    assert not got_f64[blind].any()  # exactly zero, and not nan


@partial(jax.jit, static_argnames=("window", "aligned", "softcap", "blocks", "skip", "hopper"))
def attend(q, cache, layer, pos, sinks=None, hopper=True, **options):
    return attention_mma(q, cache, layer, pos, scale=0.125, sinks=sinks, hopper=hopper, interpret=True, **options)


def with_sinks(options: dict[str, Any], heads: int) -> dict[str, Any]:
    return options | {"sinks": jnp.linspace(-2.0, 5.0, heads)} if options.get("sinks") else options


def run(q: jax.Array, cache: KVCache, pos: jax.Array, **options: Any) -> jax.Array:
    """Interpreted, and without races in both kernels: `interpret` asks the last one."""
    races, make = [], gpu_callbacks.GPURaceDetectionState  # pyright: ignore[reportPrivateImportUsage]

    def made(**given: Any) -> Any:
        races.append(make(**given))
        return races[-1]

    with mock.patch.object(gpu_callbacks, "GPURaceDetectionState", made):
        out = mosaic.interpret(attend, q, cache, LAYER, pos, **options)
    (_, t, heads, group, width), slots = q.shape, cache.k.shape[3]
    blocks = options.get("blocks") or blocks_for(width, t * group, slots, heads, split=t <= FEW, hopper=True)
    assert len(races) == (1 if blocks.splits == 1 else 2)
    assert not any(one.races_found for one in races), "RACE DETECTED"
    return out


pytestmark = pytest.mark.usefixtures("quick_compiler")

CASES = {  # tokens, KV heads, group, width, type, positions held, ends of rows, blocks, options
    "decode, sinks": (1, 2, 3, 64, "bfloat16", full(128, 128, 33, 0), (128, 33, 0), SPLIT, {"sinks": True}),
    "decode, default blocks": (1, 1, 4, 128, "bfloat16", full(256, 250), (250,), None, {}),
    "verify, padding": (8, 1, 3, 96, "float16", full(64, 60, 3, 0), (60, 3, 0), None, {"softcap": 3.0}),
    "ring": (2, 1, 8, 64, "bfloat16", full(96, 150, 40), (150, 40), SPLIT, {"window": 40}),
    "ring, chunk": (20, 1, 4, 32, "bfloat16", full(64, 150, 9), (150, 9), WIDE, {"window": 20, "sinks": True}),
    "aligned": (20, 1, 3, 80, "float16", full(64, 61), (61,), WIDE, {"window": 16, "aligned": True}),
    "a head of 256": (1, 1, 2, 256, "bfloat16", full(64, 64), (64,), None, {}),
    "a head of 512": (1, 1, 8, 512, "bfloat16", full(64, 50), (50,), None, {}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case):
    tokens, heads, group, width, dtype, held, ends, blocks, options = case
    cache, pos = cached(held, heads, width, dtype), queries(tokens, *ends)
    q = normal(len(ends), tokens, heads, group, width, dtype=dtype)
    options = with_sinks(options, heads * group)
    check(run(q, cache, pos, blocks=blocks, **options), q, cache, pos, **options)


@pytest.mark.parametrize(("tokens", "blocks"), [(2, SPLIT), (9, ONE)], ids=["decode", "chunk"])
def test_after_an_eviction(tokens, blocks):
    """Heads hold positions of their own, slots may be empty, and the next token lies where the shift says."""
    ends = 130, 45
    held, shift = evicted(96, 2, 40, *ends, new=tokens)
    cache, q, pos = cached(held, 2, 32, shift=shift), normal(2, tokens, 2, 1, 32), queries(tokens, *ends)
    check(run(q, cache, pos, blocks=blocks), q, cache, pos)


def test_of_huge_logits_constant_keys_and_one_visible_key():
    q, cache, pos, lone = hard()
    got = run(q, cache, pos, blocks=SPLIT)
    check(got, q, cache, pos)
    np.testing.assert_array_equal(got[list(lone), 0, 0], lone_values(cache, lone))


wrapping = pytest.mark.parametrize(("tokens", "blocks"), [(2, SPLIT), (9, ONE)], ids=["decode", "chunk"])


@wrapping
def test_skipping_changes_no_bit(tokens, blocks):
    """Blocks before a window, and behind all tokens; of the second row with values there that would show themselves.

    With the program that rings are compared with below.
    """
    ends, options = (200, 40), {"blocks": blocks, "window": 80}
    cache, q, pos = cached(full(256, *ends), 1, 32), normal(2, tokens, 1, 2, 32), queries(tokens, *ends)
    poisoned = replace(cache, v=cache.v.at[:, 1, :, 64:].set(jnp.nan))
    got, all_visited = (run(q, poisoned, pos, **options | more) for more in ({}, {"skip": False}))
    check(got, q, cache, pos, window=80)
    np.testing.assert_array_equal(all_visited[0], got[0])
    assert np.isnan(all_visited[1]).any()


@wrapping
def test_a_ring_gives_the_bits_of_a_cache_that_never_wraps(tokens, blocks):
    ends, options = (250, 40), {"blocks": blocks, "window": 80}
    linear, q, pos = cached(full(256, *ends), 1, 32), normal(2, tokens, 1, 2, 32), queries(tokens, *ends)
    held = jnp.asarray(full(160, *ends), jnp.int32)
    place = jnp.maximum(held, 0)[None, ..., None]
    k, v = (jnp.take_along_axis(a, place, axis=3) for a in (linear.k, linear.v))
    ring = KVCache(k, v, jnp.broadcast_to(held, (2, *held.shape)))
    got = run(q, ring, pos, **options)
    check(got, q, ring, pos, window=80)
    np.testing.assert_array_equal(run(q, linear, pos, **options), got)


def test_a_row_alone_has_the_bits_that_it_has_in_a_batch_and_so_have_splits_that_share_a_cta():
    ends = 128, 9
    cache, q, pos = cached(full(128, *ends), 1, 32), normal(2, 1, 1, 2, 32), queries(1, *ends)
    got = run(q, cache, pos, blocks=replace(SPLIT, ctas=4))
    check(got, q, cache, pos)
    for row in range(2):
        one = jax.tree.map(lambda a, row=row: a[:, row : row + 1], cache)
        np.testing.assert_array_equal(run(q[row : row + 1], one, pos[row : row + 1], blocks=SPLIT)[0], got[row])


@pytest.mark.parametrize("blocks", [ONE, replace(SPLIT, least=3)], ids=["chunk", "decode"])
def test_a_missing_fence_would_be_found(blocks):
    """The fence that sm_90 needs: without it the tests above would fail."""
    cache, q, pos = cached(full(96, 96), 1, 32), normal(1, 1, 1, 1, 32), queries(1, 96)
    with pytest.raises((AssertionError, RuntimeError), match="RACE DETECTED"):
        run(q, cache, pos, blocks=blocks, hopper=False)


def of_parts(heads: int, rows: int, parts: int, width: int, m: int) -> tuple[jax.Array, jax.Array, np.ndarray, Any]:
    """Parts of softmaxes in the last `rows` of m; all of each in float64, [BK, rows, H], and by how much f32 may err.

    Of the first row of each head a part saw nothing, of the last row all; of the last head weights are all or nothing.
    """
    rng, keys = np.random.default_rng(0), 6
    s = rng.normal(size=(heads, parts, rows, keys)) * 20
    v = rng.normal(size=(*s.shape, width))
    s[:, 1, 0] = s[:, :, -1] = -np.inf
    s[-1] *= 1e4
    with np.errstate(divide="ignore", invalid="ignore"):
        top = s.max(-1, keepdims=True)
        e = np.exp2(s - np.where(top > -np.inf, top, 0))
        lse = np.log2(e.sum(-1)) + top[..., 0]
        o = (e[..., None] * v).sum(-2) / e.sum(-1)[..., None]  # nan where nothing was seen
        both = np.exp2(s - np.where((most := top.max(1, keepdims=True)) > -np.inf, most, 0))
        want = (both[..., None] * v).sum((1, -2)) / np.maximum(both.sum((1, -1)), 1e-300)[..., None]
    assert np.isnan(o).any()
    assert not want[:, -1].any()
    # A handful of terms, each with a rounding or two, and the rounding of the logarithms.
    noise = 4 * (1e-6 + 2.0**-24 * np.abs(np.where(s > -np.inf, s, 0)).max((1, -1)))[..., None]
    front = ((0, 0), (0, 0), (m - rows, 0))  # what fills the tile is nobody's
    o, lse = (np.pad(a, front + ((0, 0),) * (a.ndim - 3), constant_values=np.nan) for a in (o, lse))
    return jnp.asarray(o, jnp.float32), jnp.asarray(lse, jnp.float32), want, noise


def check_joined(got: jax.Array, want: np.ndarray, noise: Any) -> None:
    b, t, kv_heads, group, width = got.shape
    rows = np.asarray(got, np.float64).swapaxes(1, 2).reshape(b * kv_heads, t * group, width)
    assert (np.abs(rows - want) <= noise + 2.0**-8 * np.abs(want) * (got.dtype == jnp.bfloat16)).all()


@pytest.mark.parametrize(("shape", "dtype"), [((2, 2, 2, 3, 16), jnp.float32), ((1, 1, 3, 2, 256), jnp.bfloat16)])
def test_joined_parts_are_the_softmax_of_all_keys(shape, dtype):
    b, t, kv_heads, group, width = shape
    o, lse, want, noise = of_parts(b * kv_heads, t * group, 4, width, 16)
    got = mosaic.interpret(jax.jit(lambda o, lse: join(o, lse, shape, dtype, interpret=True)), o, lse)
    assert got.dtype == dtype
    assert got.shape == shape
    check_joined(got, want, noise)


def test_parts_are_added_in_their_order():
    """Weights and their sum are powers of two: products and the quotient are exact, and each sum shows its rounding."""
    logs, width = np.array([-2, 0, -5, -1, -3, -5, -4], np.float32), 128
    o = normal(1, len(logs), 16, width, dtype="float32")
    lse = jnp.broadcast_to(logs[:, None], o.shape[:3])

    def run(o: jax.Array, lse: jax.Array) -> jax.Array:
        return join(o, lse, (1, 1, 1, 1, width), jnp.float32, interpret=True)

    got = mosaic.interpret(jax.jit(run), o, lse)
    want = np.zeros(width, np.float32)
    for x, weight in zip(np.asarray(o[0, :, -1]), np.exp2(logs), strict=True):
        want += x * weight
    np.testing.assert_array_equal(got[0, 0, 0, 0], want / np.exp2(logs).sum())


def test_what_the_kernel_does_not_cover_is_refused():
    def call(q, cache, **options):
        return attention_mma(q, cache, LAYER, queries(1, 9), scale=1.0, hopper=True, **options)

    q, cache = normal(1, 1, 1, 1, 64), cached(full(64, 9), 1, 64)
    with pytest.raises(NotImplementedError, match="float32"):
        call(q.astype(jnp.float32), cache)
    with pytest.raises(NotImplementedError, match="are not alike bfloat16 or float16"):
        call(q.astype(jnp.float16), cache)
    with pytest.raises(NotImplementedError, match="attention_mma: heads of 72"):
        call(normal(1, 1, 1, 1, 72), cached(full(64, 9), 1, 72))
    with pytest.raises(NotImplementedError, match="72 slots"):
        call(q, cached(full(72, 9), 1, 64))
    with pytest.raises(ValueError, match="keys=48"):
        call(q, cache, blocks=Blocks(16, 2, 48, 2))


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256, 512])
def test_blocks_fit_into_shared_memory_and_do_not_depend_on_the_batch(width, hopper):
    for rows in (1, 16, 17, 64, 8192):
        for slots in (128, 384, 2064, 131072):
            b = blocks_for(width, rows, slots, 8, split=True, hopper=hopper)
            assert slots % b.keys == 0
            size = b.stages * b.keys * width * 4 + b.rows * b.keys * 4
            assert (
                size + 4096 <= mosaic.SHARED[(9, 0) if hopper else (8, 9)][1]
            )  # and what reductions and barriers take
            assert b.splits * b.least * b.keys <= max(slots, b.least * b.keys)


def programs(arch: tuple[int, int], widths: tuple[int, ...] = (64, 80, 96, 128, 256, 512)) -> Iterator[mosaic.Program]:
    """Kernels as models of every width call them: a token, a few to verify, a chunk; and with every option."""

    def shape(*dims: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype)

    def one(tokens: int, group: int, width: int, dtype: Any = jnp.bfloat16, many: bool = False, **options: Any):
        b, heads, slots = 2, 4, 1024
        kv, pos = (
            shape(2, b, heads, slots, width, dtype=dtype),
            shape(2, b, heads if many else 1, slots, dtype=jnp.int32),
        )
        shift, sinks = (shape(b, dtype=jnp.int32), shape(heads * group, dtype=jnp.float32)) if many else (None, None)

        def f(q, cache, layer, at, sinks):
            return attention_mma(q, cache, layer, at, scale=0.1, sinks=sinks, hopper=arch >= (9, 0), **options)

        q, at = shape(b, tokens, heads, group, width, dtype=dtype), shape(b, tokens, dtype=jnp.int32)
        name = f"{tokens} tokens, {group} x {width} {jnp.dtype(dtype).name} {options}" + " evicted, sinks" * many
        return name, f, (q, KVCache(kv, kv, pos, shift=shift), shape(dtype=jnp.int32), at, sinks)

    for width in widths:
        yield one(1, 4, width)
        yield one(FEW, 8, width)
    yield one(1024, 4, 128)
    yield one(1, 8, 128, jnp.float16, many=True, window=512, softcap=50.0)
    yield one(1024, 8, 64, many=True, window=128, aligned=True)
    for parts, width in ((32, 64), (32, 128), (64, 512), (128, 80)):
        o, lse = shape(2, parts, 16, width, dtype=jnp.float32), shape(2, parts, 16, dtype=jnp.float32)
        yield f"{parts} x {width}", partial(join, shape=(2, 2, 1, 4, width), dtype=jnp.bfloat16), (o, lse)


@pytest.mark.parametrize("arch", [(8, 0), (9, 0)])  # sm_89 differs in what a multiprocessor holds
def test_lowered_for_a_gpu(arch):
    for _, f, args in list(programs(arch, widths=(80,)))[:-3]:  # and 64 and 128, with options; parts of one number
        assert "mosaic_gpu" in mosaic.lower(f, *args, arch=arch)


@mosaic.needs_ptxas
@pytest.mark.parametrize("arch", mosaic.ARCHS)
def test_compiled_for_a_gpu_without_spills(arch):
    reports = mosaic.ptxas("test_flash_mma", arch)
    assert reports.keys() == {name for name, *_ in programs(arch)}
    assert not {name: report for name, report in reports.items() if report[1]}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "heads", "group", "width", "slots", "ends", "options"),
    [
        (1, 8, 4, 128, 32768, (32768, 777, 4001), {}),
        (8, 2, 8, 256, 16384, (16000, 40), {}),
        (1, 4, 8, 512, 4096, (4096,), {}),
        (1, 16, 2, 256, 1280, (131072, 900), {"window": 1024, "softcap": 30.0}),
        (2, 8, 8, 64, 384, (9000, 100), {"window": 128, "sinks": True}),
        (5, 2, 3, 96, 1024, (1000, 3), {}),
        (512, 8, 4, 128, 2048, (2048, 700), {}),
    ],
)
def test_on_a_gpu_at_full_size(tokens, heads, group, width, slots, ends, options: dict[str, Any]):
    options = with_sinks(options, heads * group)
    hopper = float(jax.devices()[0].compute_capability) >= 9

    @partial(jax.jit, static_argnames=("skip", "blocks"))
    def attend(q, cache, pos, skip=True, blocks=None):
        return attention_mma(q, cache, LAYER, pos, scale=0.125, skip=skip, blocks=blocks, hopper=hopper, **options)

    cache, pos = cached(full(slots, *ends), heads, width), queries(tokens, *ends)
    q = normal(len(ends), tokens, heads, group, width)
    got = attend(q, cache, pos)
    check(got, q, cache, pos, **options)
    np.testing.assert_array_equal(attend(q, cache, pos), got)
    np.testing.assert_array_equal(attend(q, cache, pos, skip=False), got)
    blocks = blocks_for(width, tokens * group, slots, heads, split=tokens <= FEW, hopper=hopper)
    np.testing.assert_array_equal(attend(q, cache, pos, blocks=replace(blocks, ctas=1)), got)
    for row in range(len(ends)):
        one = jax.tree.map(lambda a, row=row: a[:, row : row + 1], cache)
        np.testing.assert_array_equal(attend(q[row : row + 1], one, pos[row : row + 1])[0], got[row])


@pytest.mark.gpu
@pytest.mark.parametrize(("parts", "width"), [(32, 64), (32, 128), (64, 512), (128, 80)])
def test_joined_on_a_gpu(parts, width):
    o, lse, want, noise = of_parts(6, 8, parts, width, 16)
    join_them = jax.jit(lambda o, lse: join(o, lse, (2, 2, 3, 4, width), jnp.bfloat16))
    check_joined(join_them(o, lse), want, noise)
