"""Cutting layers into segments against brute force, and running segments against a plain loop over the layers."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.segments import Layers, Segment, arrange, cut, run


def spelled(signatures, cuts) -> list:
    """The layers that a cut stands for: each segment's first pattern, as often as it is repeated."""
    out, start = [], 0
    for length, repeats in cuts:
        assert length >= 1
        assert repeats >= 1
        out += list(signatures[start : start + length]) * repeats
        start += length * repeats
    return out


@cache
def cheapest(signatures: tuple) -> tuple[int, int]:
    """(bodies, segments) of the best cut, by trying every first segment."""
    if not signatures:
        return 0, 0
    found = []
    for length in range(1, len(signatures) + 1):
        for repeats in range(1, len(signatures) // length + 1):
            if signatures[: length * repeats] == signatures[:length] * repeats:
                bodies, segments = cheapest(signatures[length * repeats :])
                found.append((bodies + length, segments + 1))
    return min(found)


@given(st.lists(st.sampled_from("ab"), max_size=10) | st.lists(st.sampled_from("abc"), max_size=9))
def test_cut_gives_the_list_with_fewest_bodies(signatures):
    cuts = cut(signatures)
    assert spelled(signatures, cuts) == signatures
    assert (sum(length for length, _ in cuts), len(cuts)) == cheapest(tuple(signatures))


@pytest.mark.parametrize(
    ("signatures", "cuts"),
    [
        ("", []),
        ("a", [(1, 1)]),
        ("a" * 36, [(1, 36)]),
        ("sssssf" * 8, [(6, 8)]),
        ("sssssf" * 5 + "ssss", [(6, 5), (1, 4)]),
        ("dddf" * 12, [(4, 12)]),
        ("6666" + "446" * 8 + "6666", [(1, 4), (3, 8), (1, 4)]),  # Q4_K_M, 32 layers: attn_v and ffn_down in Q6_K
        ("a" * 3 + "b" * 20, [(1, 3), (1, 20)]),
    ],
)
def test_cut_finds_the_rhythms_of_models(signatures, cuts):
    assert cut(signatures) == cuts


def test_cut_takes_any_signatures_and_many_layers():
    layers = [("llama", (i % 3, (4096, 4096))) for i in range(126)]
    assert cut(layers) == [(3, 42)]
    assert sum(length for length, _ in cut(list(range(126)))) == 126


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), st.booleans())
def test_arranged_layers_are_stacked_by_signature_in_their_order(signatures, unroll):
    alike, segments = arrange(signatures, unroll=unroll)
    assert sorted(i for one in alike for i in one) == list(range(len(signatures)))
    assert all(one == sorted(one) and len({signatures[i] for i in one}) == 1 for one in alike)
    assert len(alike) == (len(signatures) if unroll else len(set(signatures)))
    layers = Layers(tuple(alike), segments)
    assert [alike[k][index] for k, index in layers.places()] == list(range(len(signatures)))
    assert layers.repeats == tuple(map(len, alike))
    if not unroll:
        assert [(len(pattern), repeats) for pattern, repeats in segments] == cut(signatures)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_run_is_a_loop_over_the_layers_in_order_and_holds_each_body_once(jit):
    """Three stacks: a, b and the single c in 3 times (a, a, b), a c, 4 times b, a."""
    signatures = "aab" * 3 + "c" + "bbbb" + "a"
    alike, segments = arrange(signatures)
    assert segments == (((0, 0, 1), 3), ((2,), 1), ((1,), 4), ((0,), 1))
    weights = np.random.default_rng(0).standard_normal((len(signatures), 5)).astype(np.float32)
    layers = Layers(tuple(jnp.asarray(weights[one]) for one in alike), segments)
    traced = []

    def step(w, i, x, held):
        traced.append((len(w), isinstance(i, int)))
        x = jnp.sin(x * 1.5 + w[i])  # the order of layers matters
        return x, held.at[i].add(x)

    def both(layers, caches, x):
        return run(layers, caches, x, step)

    x = jnp.linspace(-1, 1, 5)
    got, held = (jax.jit(both) if jit else both)(layers, tuple(jnp.zeros((len(one), 5)) for one in alike), x)
    want, each = np.linspace(-1, 1, 5), []
    for w in weights:
        want = np.sin(want * 1.5 + w.astype(np.float64))
        each.append(want)
    # f32 rounding, at most 1.5 times larger by each of 15 layers, and smaller where the sine is flat
    np.testing.assert_allclose(got, want, atol=1e-4)
    # A body for each layer of a pattern; a plain number where there is nothing to choose from.
    assert traced == [(7, False)] * 2 + [(7, False)] + [(1, True), (7, False), (7, False)]
    assert isinstance(held, tuple)
    for one, new in zip(alike, held, strict=True):
        np.testing.assert_allclose(new, np.array(each)[one], atol=1e-4)


def test_run_carries_any_pytree_and_wants_a_cache_for_every_stack():
    layers = Layers((jnp.arange(4.0),), (Segment((0,), 4),))
    x, caches = run(layers, [None], {"sum": jnp.float32(0)}, lambda w, i, x, c: ({"sum": x["sum"] + w[i]}, c))
    assert (float(x["sum"]), caches) == (6.0, (None,))
    with pytest.raises(ValueError, match="0 caches for 1 stacks"):
        run(layers, [], x, lambda w, i, x, c: (x, c))


def test_layers_that_are_not_stacked_are_traced_once_a_signature():
    traced = []

    def step(w, i, x, held):
        traced.append(w.shape)
        return x * w[i, :2], held

    stacks = tuple(jnp.full((1, n), value) for n, value in ((2, 2.0), (3, 3.0), (2, 5.0), (3, 7.0)))
    layers = Layers(stacks, (Segment((0, 1, 2, 3), 1),))
    x, _ = jax.jit(lambda s, x: run(s, [None] * 4, x, step))(layers, jnp.ones(2))
    assert (x.tolist(), traced) == ([210, 210], [(1, 2), (1, 3)])
