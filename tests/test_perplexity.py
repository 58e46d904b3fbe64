"""Perplexity against llama.cpp's logits, and against the protocol written out in float64 numpy."""

import math
from itertools import pairwise

import goldens
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer import engine
from jaxinfer.cache import KVCache
from jaxinfer.perplexity import perplexity
from jaxinfer.presses import SnapKV
from jaxinfer.session import Session
from jaxinfer.snapkv import Eviction

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(scope="module")
def loaded():
    return jaxinfer.load(goldens.model_path("qwen3"), expand=False)


@pytest.fixture(scope="module")
def golden():
    return goldens.golden("qwen3.base")


def nll(logits: np.ndarray, tokens: list[int]) -> list[float]:
    """-log p of each token but the first under the logits before it."""
    logits = logits.astype(np.float64)
    total = np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)) + logits.max(axis=1)
    return [total[i] - logits[i, after] for i, (_, after) in enumerate(pairwise(tokens))]


def protocol(loaded, ids: list[int], ctx: int, bos: int | None) -> list[tuple[float, float]]:
    """(perplexity, error) after each window."""
    scored, out = [], []
    for start in range(0, len(ids) - ctx + 1, ctx):
        window = ids[start : start + ctx]
        shown = window if bos is None else [bos, *window[1:]]
        logits = jaxinfer.score(loaded.model, loaded.params, shown)
        scored += nll(logits, window)[ctx // 2 :]
        mean = sum(scored) / len(scored)
        error = math.sqrt((sum(x * x for x in scored) / len(scored) - mean**2) / (len(scored) - 1))
        out.append((math.exp(mean), math.exp(mean) * error))
    return out


def test_llama_cpp_logits(loaded, golden):
    """The first of two windows of 24 tokens is the start of the golden prompt: 11 tokens are scored, 13 to 23."""
    first = next(perplexity(loaded.model, loaded.params, golden.tokens, ctx=24))
    want = np.mean(nll(golden.logits, golden.tokens)[12:23])
    # Both engines' float noise, 7e-5 in a logit, moves a log probability by at most twice as much.
    assert math.log(first.perplexity) == pytest.approx(want, abs=3e-4)


@pytest.mark.parametrize("bos", [None, 284])
@pytest.mark.parametrize(("ctx", "chunk"), [(16, None), (15, 4), (24, 16)])
def test_protocol(loaded, golden, ctx, chunk, bos):
    ids = golden.tokens
    got = list(perplexity(loaded.model, loaded.params, ids, ctx=ctx, chunk=chunk, bos=bos))
    assert [e.windows for e in got] == list(range(1, len(ids) // ctx + 1))
    # f32 against float64 in the softmax, 1e-7 relative, and chunks summed in another order: both far below this.
    want = protocol(loaded, ids, ctx, bos)
    np.testing.assert_allclose([(e.perplexity, e.error) for e in got], want, rtol=1e-4)


def test_one_scored_token_has_no_error(loaded, golden):
    first, second, *_ = perplexity(loaded.model, loaded.params, golden.tokens, ctx=3)
    assert math.isnan(first.error)
    assert second.error > 0


def test_chunks_of_any_size_agree(loaded, golden):
    ids = golden.tokens
    got = [list(perplexity(loaded.model, loaded.params, ids, ctx=15, chunk=c))[-1][1:] for c in (1, 4, 64)]
    np.testing.assert_allclose(got, [got[0]] * 3, rtol=1e-4)  # as above


CTX, HALF, KEEP = 60, 30, 12
EVICTION = Eviction(press=SnapKV(window=4, kernel=3), keep=KEEP)


def without_evicted(session: Session, kept) -> tuple:
    """The whole cache with every position masked that is in no list; each head has its own."""

    def one(stack, lists):
        repeats, batch, heads, slots, _ = stack.k.shape
        stays = np.zeros((repeats, batch, heads, slots), bool)
        np.put_along_axis(stays, np.asarray(lists), True, axis=3)
        assert (stays.sum(3) == KEEP).all()
        return KVCache(stack.k, stack.v, jnp.where(stays, stack.pos, -1), stack.chunk)

    return tuple(map(one, session.cache, kept))


def test_an_eviction_is_the_full_cache_with_positions_masked(loaded):
    model, params, _ = loaded
    ids = np.random.default_rng(3).integers(model.config.vocab, size=2 * CTX).tolist()
    scored = []
    for window in (ids[:CTX], ids[CTX:]):
        session = Session(model, params, ctx=CTX, chunk=CTX, eviction=EVICTION)
        session.extend([window[:HALF]])
        whole = session.fork()
        session.evict(CTX - HALF)
        cache = without_evicted(whole, session.kept)
        tokens, pos = np.array([window[HALF:]], np.int32), np.arange(HALF, CTX, dtype=np.int32)[None]
        logits, _ = engine.chunk_logits(model, params, tokens, pos, cache)
        scored += nll(np.asarray(logits)[0], window[HALF:])
    assert len(scored) == 2 * (CTX - HALF - 1)
    *_, got = perplexity(model, params, ids, ctx=CTX, eviction=EVICTION)
    # Chunks and caches of other shapes: f32 sums in another order, 1e-4 in a logit as between the chunks above.
    assert math.log(got.perplexity) == pytest.approx(np.mean(scored), abs=3e-4)
    *_, plain = perplexity(model, params, ids, ctx=CTX)
    assert abs(math.log(plain.perplexity) - np.mean(scored)) > 3e-3, "the eviction was seen"


def test_an_eviction_in_chunks_of_any_size(loaded):
    ids = np.random.default_rng(3).integers(loaded.model.config.vocab, size=2 * CTX).tolist()
    options = {"ctx": CTX, "eviction": EVICTION, "bos": 284}
    got = [list(perplexity(loaded.model, loaded.params, ids, chunk=chunk, **options))[-1][1:] for chunk in (16, CTX)]
    np.testing.assert_allclose(*got, rtol=1e-4)  # as above
    interleaved = Eviction(press=EVICTION.press, keep=KEEP, interleaved=True)
    *_, other = perplexity(loaded.model, loaded.params, ids, chunk=16, **options | {"eviction": interleaved})
    assert other.perplexity != pytest.approx(got[0][0], rel=1e-3)


@pytest.mark.parametrize("keep", [0, None, HALF, CTX])  # None: the cache is small
def test_an_eviction_that_keeps_all_changes_nothing(loaded, keep):
    ids = np.random.default_rng(3).integers(loaded.model.config.vocab, size=2 * CTX).tolist()
    got = list(
        perplexity(loaded.model, loaded.params, ids, ctx=CTX, eviction=Eviction(press=EVICTION.press, keep=keep))
    )
    assert got == list(perplexity(loaded.model, loaded.params, ids, ctx=CTX))


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([1] * 47, {"ctx": 24}, "has 47 tokens, but windows of ctx=24 tokens need at least 48"),
        ([1] * 48, {"ctx": 2}, "ctx=2 must be at least 3"),
        ([1] * 48, {"ctx": 0}, "ctx=0 must be at least 3"),
        ([1] * 48, {"ctx": 8, "chunk": 0}, "chunk=0 must be at least 1"),
        ([288] * 48, {"ctx": 8}, "288.*from 0 to 287"),
        ([1] * 48, {"ctx": 8, "bos": -1}, "-1.*from 0 to 287"),
    ],
)
def test_bad_input(loaded, ids, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(loaded.model, loaded.params, ids, **options)
