"""Hopper's attention kernel against float64: interpreted, lowered and compiled without a GPU, and on one."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from jax import lax
from test_flash_mma import (
    LAYER,
    cached,
    check,
    evicted,
    full,
    hard,
    lone_values,
    normal,
    queries,
    wanted,
    with_sinks,
)

from jaxinfer.cache import KVCache, empty, write
from jaxinfer.pallas.flash import SHARED, Blocks, blocks_for, flash_attention

SMALL = Blocks(keys=32)
FEW = replace(SMALL, ctas=2)  # which share all tiles
HALVES = Blocks(keys=32, halves=2, ctas=2)


@partial(jax.jit, static_argnames=("window", "aligned", "softcap", "blocks", "skip"))
def attend(q, cache, layer, pos, sinks=None, **options):
    return flash_attention(q, cache, layer, pos, scale=0.125, sinks=sinks, interpret=True, **options)


def run(q: jax.Array, cache: KVCache, pos: jax.Array, **options: Any) -> jax.Array:
    return mosaic.interpret(attend, q, cache, LAYER, pos, **options)


pytestmark = pytest.mark.usefixtures("quick_compiler")

CASES = {  # tokens, KV heads, group, width, type, positions held, ends of rows, blocks, options
    "padding, more tiles than CTAs": (70, 2, 2, 64, "bfloat16", full(128, 128, 0, 30), (128, 0, 30), FEW, {}),
    "one token": (1, 1, 4, 128, "float16", full(256, 250), (250,), None, {}),
    "ring": (20, 1, 8, 64, "float16", full(96, 150, 40), (150, 40), FEW, {"window": 40}),
    "ring of no large block": (40, 1, 4, 80, "bfloat16", full(80, 90, 9), (90, 9), None, {"window": 20, "sinks": True}),
    "aligned": (20, 1, 3, 96, "float16", full(64, 61), (61,), SMALL, {"window": 16, "aligned": True, "softcap": 3.0}),
    "a head of 256": (20, 1, 2, 256, "bfloat16", full(128, 150), (150,), None, {"window": 24}),
    "a head of 512": (8, 2, 8, 512, "bfloat16", full(64, 50, 7), (50, 7), HALVES, {"sinks": True, "softcap": 30.0}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case):
    tokens, heads, group, width, dtype, held, ends, blocks, options = case
    cache, pos = cached(held, heads, width, dtype), queries(tokens, *ends)
    q = normal(len(ends), tokens, heads, group, width, dtype=dtype)
    options = with_sinks(options, heads * group)
    check(run(q, cache, pos, blocks=blocks, **options), q, cache, pos, **options)


def test_after_an_eviction():
    """Heads hold positions of their own, slots may be empty, and the next token lies where the shift says."""
    ends = 130, 45
    held, shift = evicted(96, 2, 40, *ends, new=20)
    cache, q, pos = cached(held, 2, 64, shift=shift), normal(2, 20, 2, 2, 64), queries(20, *ends)
    check(run(q, cache, pos, blocks=SMALL), q, cache, pos)


def test_padding_before_tokens_that_come_late():
    """As rows of a batch get them in a later turn: in a ring the padding's tile still finds the window."""
    cache, q = cached(full(96, 150, 141), 1, 64, "float16"), normal(2, 20, 1, 8, 64, dtype="float16")
    pos = queries(20, 150, 141).at[1, :15].set(-1)
    check(run(q, cache, pos, blocks=FEW, window=40), q, cache, pos, window=40)  # the program of the ring above


def test_of_huge_logits_constant_keys_and_one_visible_key():
    q, cache, pos, lone = hard()
    got = run(q, cache, pos, blocks=SMALL)
    check(got, q, cache, pos)
    np.testing.assert_array_equal(got[list(lone), 0, 0], lone_values(cache, lone))


SHARED_PROGRAM: dict[str, Any] = {"blocks": FEW, "window": 50}  # of the tests below, with caches of 256 slots


def test_skipping_changes_no_bit():
    """Blocks before a window, and behind all tokens; of the second row with values there that would show themselves."""
    ends = 200, 40
    cache, q, pos = cached(full(256, *ends), 1, 64), normal(2, 32, 1, 8, 64), queries(32, *ends)
    poisoned = replace(cache, v=cache.v.at[:, 1, :, 64:].set(jnp.nan))
    got, all_visited = (run(q, poisoned, pos, **SHARED_PROGRAM | more) for more in ({}, {"skip": False}))
    check(got, q, cache, pos, window=50)
    np.testing.assert_array_equal(all_visited[0], got[0])
    assert np.isnan(all_visited[1]).any()


def test_a_ring_gives_the_bits_of_a_cache_that_never_wraps():
    ends = 250, 40
    linear, q, pos = cached(full(256, *ends), 1, 64), normal(2, 32, 1, 8, 64), queries(32, *ends)
    held = jnp.asarray(full(128, *ends), jnp.int32)
    place = jnp.maximum(held, 0)[None, ..., None]
    k, v = (jnp.take_along_axis(a, place, axis=3) for a in (linear.k, linear.v))
    ring = KVCache(k, v, jnp.broadcast_to(held, (2, *held.shape)))
    got = run(q, ring, pos, **SHARED_PROGRAM)
    check(got, q, ring, pos, window=50)
    np.testing.assert_array_equal(run(q, linear, pos, **SHARED_PROGRAM), got)


def test_tiles_rows_and_chunks_change_no_bit():
    """A row alone, its chunk in two, a CTA for each, and one token of it, against a cache with what came later."""
    ends, alone = (250, 40), {"blocks": SMALL, "window": 50}
    cache, q, pos = cached(full(256, *ends), 1, 64), normal(2, 32, 1, 8, 64), queries(32, *ends)
    got = run(q, cache, pos, **SHARED_PROGRAM)  # 2 tiles of 16 tokens a row, 2 CTAs for all
    check(got, q, cache, pos, window=50)
    for row, tokens in ((0, np.s_[:16]), (1, np.s_[16:]), (0, np.s_[16:17])):
        part, one = np.s_[row : row + 1, tokens], jax.tree.map(lambda a, row=row: a[:, row : row + 1], cache)
        np.testing.assert_array_equal(run(q[part], one, pos[part], **alone), got[part])


def test_what_the_kernel_does_not_cover_is_refused():
    def call(q, cache, **options):
        return flash_attention(q, cache, LAYER, queries(1, 9), scale=1.0, **options)

    q, cache = normal(1, 1, 1, 1, 64), cached(full(64, 9), 1, 64)
    with pytest.raises(NotImplementedError, match="flash_attention: queries of float32"):
        call(q.astype(jnp.float32), cache)
    with pytest.raises(NotImplementedError, match=r"float16 .*bfloat16"):
        call(q.astype(jnp.float16), cache)
    with pytest.raises(NotImplementedError, match="flash_attention: heads of 72"):
        call(normal(1, 1, 1, 1, 72), cached(full(64, 9), 1, 72))
    with pytest.raises(NotImplementedError, match="flash_attention: heads of 528"):
        call(normal(1, 1, 1, 1, 528), cached(full(64, 9), 1, 528))
    with pytest.raises(NotImplementedError, match="flash_attention: 72 slots"):
        call(q, cached(full(72, 9), 1, 64))
    with pytest.raises(ValueError, match=r"keys=24.* do not fit heads of 64"):
        call(q, cache, blocks=Blocks(keys=24))
    with pytest.raises(ValueError, match=r"halves=1.* do not fit heads of 512"):
        call(normal(1, 1, 1, 1, 512), cached(full(64, 9), 1, 512), blocks=Blocks(keys=32))
    with pytest.raises(ValueError, match=r"halves=2.* do not fit heads of 80"):
        call(normal(1, 1, 1, 1, 80), cached(full(64, 9), 1, 80), blocks=HALVES)
    with pytest.raises(ValueError, match=r"keys=32.* do not fit .* 80 slots"):
        call(q, cached(full(80, 9), 1, 64), blocks=SMALL)


def test_blocks_are_whole_and_fit_into_shared_memory():
    for width in range(16, 528, 16):
        for slots in (16, 80, 384, 2064, 131072):
            b = blocks_for(width, slots)
            assert slots % b.keys == 0
            assert width // b.halves <= 256
            assert 2 * width * (b.rows + 2 * b.stages * b.keys) <= SHARED  # queries, keys and values


def programs(arch: tuple[int, int], widths: tuple[int, ...] = (64, 80, 96, 128, 256, 512)) -> Iterator[mosaic.Program]:
    """Kernels as models call them: of every width, and with a window and every option where models have them."""
    assert arch == (9, 0)

    def shape(*dims: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype)

    def one(width: int, group: int, tokens: int = 1024, dtype: Any = jnp.bfloat16, many: bool = False, **options: Any):
        b, heads, slots = 2, 4, 2048
        kv = shape(2, b, heads, slots, width, dtype=dtype)
        held = shape(2, b, heads if many else 1, slots, dtype=jnp.int32)
        shift, sinks = (shape(b, dtype=jnp.int32), shape(heads * group, dtype=jnp.float32)) if many else (None, None)

        def f(q, cache, layer, at, sinks):
            return flash_attention(q, cache, layer, at, scale=0.1, sinks=sinks, **options)

        q, at = shape(b, tokens, heads, group, width, dtype=dtype), shape(b, tokens, dtype=jnp.int32)
        name = (
            f"heads of {width}, {group}, {tokens} tokens, {jnp.dtype(dtype).name} {options}" + " evicted, sinks" * many
        )
        return name, f, (q, KVCache(kv, kv, held, shift=shift), shape(dtype=jnp.int32), at, sinks)

    for width in widths:
        yield one(width, 8 if width in (64, 256, 512) else 4)  # gpt-oss, Qwen3.6, Gemma 4; Qwen3
    if 64 in widths:
        yield one(64, 8, many=True, window=128)
        yield one(64, 5, many=True, window=8192, aligned=True)
    if 128 in widths:
        yield one(128, 4, window=1024)
        yield one(128, 3, 1, jnp.float16, many=True, window=512, softcap=50.0)
    if 256 in widths:
        yield one(256, 2, window=1024)


@pytest.mark.parametrize("widths", [(64, 80, 96), (128, 256, 512)])
def test_lowered_for_a_gpu(widths):
    """Which checks the layouts of products, and that all buffers fit into shared memory."""
    last = {name.split(",")[0]: program for name, *program in programs((9, 0), widths)}  # of a width, with its options
    for f, args in last.values():
        assert "mosaic_gpu" in mosaic.lower(f, *args, arch=(9, 0))
    assert len(last) == len(widths)


@mosaic.needs_ptxas
def test_compiled_for_a_gpu_with_few_spills():
    """Only where accumulators of 64 x 256 take 128 of a thread's registers, and it costs little there.

    Heads of 512 reached 307 TFLOP/s on an H200 with what they spill.
    """
    reports = mosaic.ptxas("test_flash", (9, 0))
    assert reports.keys() == {name for name, *_ in programs((9, 0))}
    most = {"heads of 256": 144, "heads of 512": 448}
    for name, (_, spilled) in reports.items():
        assert spilled <= most.get(name.split(",")[0], 0), name


LARGE = {  # tokens, KV heads, group, width, options
    "heads of 128": (16384, 8, 4, 128, {}),
    "a window": (16384, 8, 4, 128, {"window": 1024}),
    "windows of a fixed place": (4096, 8, 5, 128, {"window": 1024, "aligned": True}),
    "heads of 64, sinks": (8192, 8, 8, 64, {"window": 128, "sinks": True}),
    "heads of 256": (4096, 8, 2, 256, {"window": 1024, "softcap": 50.0}),
    "heads of 512": (8192, 4, 8, 512, {}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_on_a_gpu_at_full_size(case):
    tokens, heads, group, width, options = case
    options = with_sinks(options, heads * group)
    pos = queries(tokens, tokens, tokens - 1000)  # the second row has padding
    shapes = (2, tokens, heads, group, width), (2, tokens, heads, width), (2, tokens, heads, width)
    q, k, v = (jax.random.normal(jax.random.key(i), x, jnp.bfloat16) for i, x in enumerate(shapes))

    @partial(jax.jit, static_argnames="skip")
    def attend(q, cache, pos, skip=True):
        return flash_attention(q, cache, LAYER, pos, scale=0.125, skip=skip, **options)

    def read(chunk: int) -> tuple[jax.Array, KVCache]:
        """Attention of all tokens, a chunk at a time, each to a cache that has just been given it: a ring, or full."""
        window = options.get("window")
        cache, out = empty(2, 2, heads, tokens, width, jnp.bfloat16, window=window, chunk=chunk), []
        assert window is None or chunk == tokens or cache.k.shape[3] < tokens
        for start in range(0, tokens, chunk):
            part = np.s_[:, start : start + chunk]
            cache = jax.jit(write, donate_argnums=0)(cache, LAYER, k[part], v[part], pos[part])
            out.append(attend(q[part], cache, pos[part]))
        return jnp.concatenate(out, axis=1), cache

    def same(a: jax.Array, b: jax.Array) -> bool:
        return bool((lax.bitcast_convert_type(a, jnp.uint16) == lax.bitcast_convert_type(b, jnp.uint16)).all())

    got, cache = read(tokens)
    for part, slots in ((np.s_[:, :128], 128), (np.s_[:, -128:], tokens)):
        some = jax.tree.map(lambda a, slots=slots: a[:, :, :, :slots], cache)
        want, _ = wanted(q[part], some, pos[part], **options)
        # Weights and results are rounded to bf16, by up to 2**-9: up to 2**-8 together, and twice that where the values
        # of a few keys cancel in part. What sees nothing is exactly zero.
        error = np.linalg.norm(np.asarray(got[part], np.float64) - want, axis=-1)
        assert (error <= 2.0**-7 * np.linalg.norm(want, axis=-1)).all()
        assert (want != 0).any()
    assert same(attend(q, cache, pos), got)
    assert same(attend(q, cache, pos, skip=False), got)
    for row in range(2):
        one = jax.tree.map(lambda a, row=row: a[:, row : row + 1], cache)
        assert same(attend(q[row : row + 1], one, pos[row : row + 1])[0], got[row])
    for n in (tokens // 2 + 3, tokens - 1):  # a token alone, among what comes later
        assert same(attend(q[:, n : n + 1], cache, pos[:, n : n + 1]), got[:, n : n + 1])
    for chunk in (2048, 1024, 256):
        by_chunks, ring = read(chunk)
        assert same(by_chunks, got)
        assert same(attend(q[:, -1:], ring, pos[:, -1:]), got[:, -1:])
