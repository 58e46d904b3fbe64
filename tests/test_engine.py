"""Invariants of the two programs: nothing about how a run is cut, padded or batched changes what it computes."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import model_path

import jaxinfer
from jaxinfer import Sampler, engine

pytestmark = pytest.mark.usefixtures("quick_compiler")

# Matrix shapes differ, so f32 sums are ordered differently: ten times the 7e-5 that llama.cpp's own logits move by when
# its batch size changes, see goldens/README.md.
TOLERANCE = {"rtol": 0, "atol": 7e-4}


@cache
def load(name: str, expand: bool = False):
    return jaxinfer.load(model_path(name), expand=expand)


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 288, n).tolist()


def prefill(model, params, prompts, chunk, slots=256, ops=None):
    """Logits of the last tokens and the cache, by the calls that `generate` makes."""
    held = model.init_cache(params, len(prompts), slots, chunk=chunk)
    for tokens, pos in engine.calls(*engine.left_pad(prompts, chunk), chunk):
        logits, held = engine.prefill(model, params, tokens, pos, held, chunk=chunk)
    return logits, held


def decode(model, params, state, steps, sampler, burst=16, stops=(-1,), seed=0):
    keys = jnp.broadcast_to(jax.random.key(seed), state.pos.shape)
    out = []
    for start in range(0, steps, burst):
        limit = np.int32(min(burst, steps - start))
        tokens, state = engine.decode(
            model, params, state, keys, np.array(stops, np.int32), limit, sampler=sampler, room=burst
        )
        out.append(np.asarray(tokens)[:, :limit])
    return np.concatenate(out, axis=1), state


def test_any_chunk_size_gives_the_same_logits():
    model, params, _ = load("llama-Q4_0")
    ids = prompt(84)  # whole calls of four chunks, which are one program, where chunks are small
    want, _ = prefill(model, params, [ids], chunk=84)
    for chunk in (1, 7, 64):
        got, _ = prefill(model, params, [ids], chunk)
        np.testing.assert_allclose(got, want, **TOLERANCE)


def test_stacked_layers_equal_separate_ones():
    ids = prompt(40)
    packed, wide = load("qwen3-Q4_0"), load("qwen3-Q4_0", expand=True)
    assert packed.params.layers.segments == (((0,), 2),)
    assert wide.params.layers.segments == (((0, 1), 1),)
    one, _ = prefill(packed.model, packed.params, [ids], 16)
    other, _ = prefill(wide.model, wide.params, [ids], 16)
    np.testing.assert_allclose(one, other, **TOLERANCE)


def test_rows_of_a_ragged_batch_equal_single_runs():
    model, params, _ = load("qwen2")
    prompts = [prompt(n, seed=n) for n in (1, 16, 33)]
    logits, held = prefill(model, params, prompts, chunk=16)
    together = np.asarray(logits).copy()  # decoding takes the logits over
    state = engine.start(logits, prompts, held, Sampler.greedy())
    tokens, _ = decode(model, params, state, 12, Sampler.greedy())
    for row, ids in enumerate(prompts):
        alone, held = prefill(model, params, [ids], chunk=16)
        np.testing.assert_allclose(together[row], alone[0], **TOLERANCE)
        want, _ = decode(model, params, engine.start(alone, [ids], held, Sampler.greedy()), 12, Sampler.greedy())
        np.testing.assert_array_equal(tokens[row], want[0])


def test_spare_pad_chunks_are_harmless():
    model, params, _ = load("qwen3")
    ids = prompt(20)
    tokens, pos = engine.left_pad([ids], 16)
    want, held = prefill(model, params, [ids], 16)
    wide = np.pad(tokens, ((0, 0), (32, 0))), np.pad(pos, ((0, 0), (32, 0)), constant_values=-1)
    got, other = engine.prefill(model, params, *wide, model.init_cache(params, 1, 256, chunk=16), chunk=16)
    np.testing.assert_array_equal(got, want)
    chex.assert_trees_all_equal(held, other)


def test_a_decode_step_is_a_chunk_of_one_token():
    model, params, _ = load("qwen3")
    ids = prompt(31)
    logits, held = prefill(model, params, [ids], 16)
    tokens, state = decode(model, params, engine.start(logits, [ids], held, Sampler.greedy()), 5, Sampler.greedy())
    want, other = prefill(model, params, [ids], 16)
    for i, token in enumerate(tokens[0]):
        assert token == np.asarray(want)[0].argmax()
        want, other = engine.prefill(model, params, np.array([[token]]), np.array([[31 + i]], np.int32), other, chunk=1)
    np.testing.assert_allclose(np.asarray(state.logits), np.asarray(want), **TOLERANCE)
    np.testing.assert_array_equal(np.asarray(state.pos), [36])
    chex.assert_trees_all_close(state.cache, other, **TOLERANCE)


def test_bursts_do_not_change_the_tokens():
    sampler = Sampler(seed=5, repeat_penalty=1.2, temperature=1.5, top_k=0)
    model, params, _ = load("llama-tied")
    ids = prompt(9)
    runs = []
    for burst in (5, 24):
        logits, held = prefill(model, params, [ids], 16)
        runs.append(decode(model, params, engine.start(logits, [ids], held, sampler), 24, sampler, burst, seed=5)[0])
    np.testing.assert_array_equal(runs[0], runs[1])
    logits, held = prefill(model, params, [ids], 16)
    other, _ = decode(model, params, engine.start(logits, [ids], held, sampler), 24, sampler, 24, seed=6)
    assert (other != runs[0]).any()


def test_rows_end_on_their_own():
    model, params, _ = load("qwen3")
    prompts = [prompt(8, seed=1), prompt(8, seed=2)]
    logits, held = prefill(model, params, prompts, 16)
    free, _ = decode(model, params, engine.start(logits, prompts, held, Sampler.greedy()), 10, Sampler.greedy())
    stop = next(t for t in free[0] if t not in free[1])
    end = free[0].tolist().index(stop)
    logits, held = prefill(model, params, prompts, 16)
    tokens, state = decode(
        model, params, engine.start(logits, prompts, held, Sampler.greedy()), 10, Sampler.greedy(), stops=(stop,)
    )
    np.testing.assert_array_equal(tokens[0], [*free[0][: end + 1], *[-1] * (9 - end)])
    np.testing.assert_array_equal(tokens[1], free[1])
    held_positions = np.asarray(state.cache[0].pos)[0, 0, 0]
    assert held_positions.max() == 8 + end  # nothing of the ended row was stored
    logits, held = prefill(model, params, prompts, 16)
    _, ended = decode(
        model, params, engine.start(logits, prompts, held, Sampler.greedy()), end + 1, Sampler.greedy(), stops=(stop,)
    )
    np.testing.assert_array_equal(state.logits[0], ended.logits[0])  # those of its end are still there


def test_the_history_holds_the_last_tokens():
    sampler = Sampler(repeat_penalty=2.0, repeat_last_n=4)
    state = engine.start(jnp.zeros((2, 9)), [[1, 2, 3, 4, 5], [6]], None, sampler)
    np.testing.assert_array_equal(np.asarray(state.history), [[2, 3, 4, 5], [-1, -1, -1, 6]])
    np.testing.assert_array_equal(np.asarray(state.pos), [5, 1])


@pytest.mark.parametrize(
    ("n", "chunk", "shapes"), [(1, 4, [4]), (16, 4, [16]), (17, 4, [16, 4]), (44, 4, [16, 16, 4, 4, 4])]
)
def test_calls_take_few_shapes(n, chunk, shapes):
    tokens, pos = engine.left_pad([prompt(n)], chunk)
    parts = list(engine.calls(tokens, pos, chunk))
    assert [t.shape[1] for t, _ in parts] == shapes
    np.testing.assert_array_equal(np.concatenate([t for t, _ in parts], axis=1), tokens)
    np.testing.assert_array_equal(np.concatenate([p for _, p in parts], axis=1)[0, -n:], np.arange(n))


def test_caches_are_donated_and_programs_traced_once():
    model, params, _ = load("qwen3")
    traced = chex.assert_max_traces(
        lambda model, params, tokens, pos, cache, chunk: engine.prefill.__wrapped__(
            model, params, tokens, pos, cache, chunk=chunk
        ),
        n=1,
    )
    program = jax.jit(traced, static_argnames=("model", "chunk"), donate_argnames="cache")
    held = model.init_cache(params, 1, 64, chunk=64)
    for start in range(0, 48, 16):
        before = held
        pos = np.arange(start, start + 16, dtype=np.int32)[None]
        _, held = program(model, params, np.array([prompt(16)], np.int32), pos, cache=held, chunk=16)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
