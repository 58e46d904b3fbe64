"""Choices and weights of a router's scores, against float64: interpreted, lowered and compiled, and on a GPU."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from models import rms_norm

from jaxinfer.layers import routing as recipes
from jaxinfer.layers.routing import ROUTINGS
from jaxinfer.ops.route import route_reference
from jaxinfer.pallas.route import route, score

interpreted = partial(mosaic.interpret, jax.jit(partial(route, interpret=True), static_argnums=(1, 2)))
quick = pytest.mark.usefixtures("quick_compiler")
scored = partial(mosaic.interpret, jax.jit(partial(score, interpret=True), static_argnums=4))
both = pytest.mark.parametrize(
    "make", [jax.jit(route_reference, static_argnums=(1, 2)), interpreted], ids=["reference", "kernel"]
)
every_recipe = pytest.mark.parametrize("routing", ROUTINGS)


def random(m: int, experts: int, seed: int = 0) -> np.ndarray:
    """A third of the scores are equal to others."""
    scores = 3 * np.random.default_rng(seed).standard_normal((m, experts), np.float32)
    scores[:, ::3] = np.round(scores[:, ::3])
    return scores


def wanted(scores: np.ndarray, used: int, routing: Any) -> tuple[np.ndarray, np.ndarray]:
    s = scores.astype(np.float64)
    chosen = np.argsort(-s, axis=1, kind="stable")[:, :used]
    best = np.take_along_axis(s, chosen, 1)
    if routing is recipes.sigmoid_of_chosen:
        return chosen, 1 / (1 + np.exp(-best))
    top = best[:, :1]
    of = best if routing is recipes.softmax_of_chosen else s
    weights = np.exp(best - top) / np.exp(of - top).sum(1, keepdims=True)
    if routing is recipes.softmax_renormalised:
        weights /= weights.sum(1, keepdims=True)
    return chosen, weights


def check(got: tuple[jax.Array, jax.Array], scores: np.ndarray, used: int, routing: Any) -> None:
    chosen, weights = wanted(scores, used, routing)
    assert [(a.shape, a.dtype) for a in got] == [(chosen.shape, jnp.int32), (chosen.shape, jnp.float32)]
    np.testing.assert_array_equal(got[0], chosen)
    # A difference to the best of up to 32 is rounded, by 2^-24 of that; exp, sums and quotients add some units.
    np.testing.assert_allclose(got[1], weights, rtol=32 * 2.0**-24 + 8 * 2.0**-23)


@quick
@both
@every_recipe
@pytest.mark.parametrize(("m", "experts", "used"), [(1, 128, 8), (6, 60, 3)])
def test_against_float64(make, m, experts, used, routing):
    scores = random(m, experts)
    check(make(scores, used, routing), scores, used, routing)


@quick
@both
def test_all_of_a_few_and_many_of_most(make):
    for experts, used in ((8, 8), (512, 10), (32, 1)):
        scores = random(3, experts, seed=1)
        check(make(scores, used, recipes.softmax_of_chosen), scores, used, recipes.softmax_of_chosen)


@quick
@both
@every_recipe
def test_ties_take_the_lowest_index(make, routing):
    scores = np.float32([[1, 1, 1, 1, 1, 1], [0, 2, 0, 2, 0, 2], [3, -1, 3, 3, -1, 4], [0, 0, -1, -1, 0, 0]])
    chosen, _ = make(scores, 4, routing)
    assert chosen.tolist() == [[0, 1, 2, 3], [1, 3, 5, 0], [5, 0, 2, 3], [0, 1, 4, 5]]


@quick
@both
def test_scores_decide_where_softmax_rounds_them_away(make):
    scores = np.float32([[-300, -200, 0, -1000], [1e-9, 0, 2e-9, 3e-9]])
    assert make(scores, 3, recipes.softmax_of_all)[0].tolist() == [[2, 1, 0], [3, 2, 0]]


@quick
@both
def test_infinities_and_nan(make):
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    scores = np.float32([[0, -inf, inf, 1], [0, nan, 5, inf], [-inf] * 4, [1, 0, -nan, 2]])
    for routing in (recipes.softmax_of_chosen, recipes.sigmoid_of_chosen):
        chosen, weights = make(scores, 3, routing)
        assert chosen.tolist() == [[2, 3, 0], [1, 3, 2], [0, 1, 2], [3, 0, 1]]
        if routing is recipes.sigmoid_of_chosen:
            np.testing.assert_array_equal(np.isnan(weights)[1], [True, False, False])
            np.testing.assert_array_equal(weights[2], [0, 0, 0])
        else:
            assert np.isnan(weights[1]).all()
            assert np.isnan(weights[2]).all()


EPS = 1e-6


def router(m: int, experts: int, width: int, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows, a stack of two layers, whose last row is the gate of a shared expert, and their norms."""
    rng = np.random.default_rng(experts)
    x = jnp.asarray(rng.standard_normal((m, width)), dtype)
    weight = rng.standard_normal((2, experts + 1, width), np.float32) / np.float32(np.sqrt(width))
    return x, jnp.asarray(weight), jnp.asarray(1 + rng.random((2, width)), jnp.float32)


def with_gate(run: Any, x: jax.Array, weight: jax.Array, *norm: Any) -> jax.Array:
    """Scores and, as the last of them, the gate's; without the gate the scores are the same."""
    scores, gate = run(x, weight[:, :-1], jnp.int32(1), *norm, weight[:, -1])
    alone, nothing = run(x, weight[:, :-1], jnp.int32(1), *norm)
    assert nothing is None
    np.testing.assert_array_equal(scores, alone)
    return jnp.concatenate([scores, gate[:, None]], axis=1)


def check_scores(got: jax.Array, x: jax.Array, weight: jax.Array, norm: np.ndarray | None) -> None:
    """Of layer 1. A normed row is rounded to its type; a sum of D products errs by D / 32 + 16 roundings at most."""
    y, w = np.asarray(x, np.float64), np.asarray(weight[1], np.float64)
    unit = 0.0
    if norm is not None:
        y, unit = rms_norm(y, norm.astype(np.float64), EPS), {"bfloat16": 2.0**-8, "float16": 2.0**-11}[str(x.dtype)]
    roundings = unit + (y.shape[1] / 32 + 16) * 2.0**-24
    assert (got.shape, got.dtype) == ((len(x), weight.shape[1]), jnp.float32)
    assert (np.abs(np.asarray(got, np.float64) - y @ w.T) <= roundings * np.abs(y) @ np.abs(w).T).all()


@quick
def test_scores_against_float64():
    x, weight, norm = router(2, 8, 384)
    check_scores(with_gate(scored, x, weight, None, None), x, weight, None)
    got = with_gate(scored, x, weight, norm, EPS)
    check_scores(got, x, weight, np.asarray(norm[1]))
    np.testing.assert_array_equal(got[1:], with_gate(scored, x[1:], weight, norm, EPS))


@quick
def test_scores_of_rows_in_float16():
    x, weight, norm = router(2, 8, 384, jnp.float16)
    got, _ = scored(x, weight[:, :-1], jnp.int32(1), norm, EPS)
    check_scores(got, x, weight[:, :-1], np.asarray(norm[1]))


def test_what_scores_are_not_made_of():
    x, weight, _ = router(1, 7, 384)
    with pytest.raises(NotImplementedError, match="score: a router in bfloat16"):
        score(x, weight.astype(jnp.bfloat16), 0)
    for wrong in (weight[:, :6], weight[..., :320]):
        with pytest.raises(NotImplementedError, match=r"score: .* for rows in bfloat16: experts by 4, columns by 128"):
            score(x[:, : wrong.shape[2]], wrong, 0)
    with pytest.raises(NotImplementedError, match="for rows in float32"):
        score(x.astype(jnp.float32), weight, 0)


def test_what_the_kernel_does_not_cover_is_refused():
    def call(experts: int, used: int, routing: Any = recipes.softmax_of_all, dtype: Any = jnp.float32) -> None:
        route(jnp.zeros((1, experts), dtype), used, routing)

    with pytest.raises(NotImplementedError, match="route: 8 of 513 experts are more than 16 of 512"):
        call(513, 8)
    with pytest.raises(NotImplementedError, match="route: 17 of 64"):
        call(64, 17)
    with pytest.raises(NotImplementedError, match="route: wanted is not among its recipes"):
        call(64, 2, wanted)
    with pytest.raises(ValueError, match="9 of 8 scores"):
        call(8, 9)
    with pytest.raises(ValueError, match="2 of 8 scores in bfloat16"):
        call(8, 2, dtype=jnp.bfloat16)


def programs(arch: tuple[int, int]) -> Iterator[mosaic.Program]:
    """Routers of published models, and the largest."""
    cases = [(2048, 128, 8, routing) for routing in ROUTINGS]
    shapes = (1, 128, 8), (8192, 256, 8), (2, 32, 4), (1, 16, 1), (4, 60, 4), (16, 512, 16)
    cases += [(*shape, recipes.softmax_of_all) for shape in shapes]
    for m, experts, used, routing in cases:
        scores = jax.ShapeDtypeStruct((m, experts), jnp.float32)
        yield f"{m} x {experts} {routing.__name__}", lambda s, u=used, r=routing: route(s, u, r), (scores,)
    for m, experts, width in ((1, 128, 2048), (16, 256, 2048), (1, 128, 2816), (1, 32, 4096)):
        S = jax.ShapeDtypeStruct
        given = S((m, width), jnp.bfloat16), S((2, experts, width), jnp.float32), S((2, width), jnp.float32)
        yield f"{m} {experts} x {width}", lambda x, w, norm: score(x, w, 1, norm, EPS, norm), given


@pytest.mark.parametrize("arch", [(8, 0), (9, 0)])
def test_lowered_for_a_gpu(arch):
    for _, f, args in programs(arch):
        assert "mosaic_gpu" in mosaic.lower(f, *args, arch=arch)


@mosaic.needs_ptxas
@pytest.mark.parametrize("arch", mosaic.ARCHS)
def test_compiled_for_a_gpu_without_spills(arch):
    reports = mosaic.ptxas("test_route", arch)
    assert reports.keys() == {name for name, *_ in programs(arch)}
    assert not {name: report for name, report in reports.items() if report[1]}


@pytest.mark.gpu
@every_recipe
@pytest.mark.parametrize(("m", "experts", "used"), [(1, 128, 8), (2048, 128, 8), (257, 60, 4), (32768, 512, 10)])
def test_on_a_gpu_at_full_size(m, experts, used, routing):
    scores = random(m, experts)
    run = jax.jit(route, static_argnums=(1, 2))
    got = run(scores, used, routing)
    check(got, scores, used, routing)
    jax.tree.map(np.testing.assert_array_equal, got, run(scores, used, routing))


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "experts", "width"), [(1, 128, 2048), (16, 256, 2048), (3, 128, 2816)])
def test_scores_on_a_gpu_at_full_size(m, experts, width):
    x, weight, norm = router(m, experts, width)
    run = jax.jit(score, static_argnums=4)
    got = with_gate(run, x, weight, norm, EPS)
    check_scores(got, x, weight, np.asarray(norm[1]))
    np.testing.assert_array_equal(got[:1], with_gate(run, x[:1], weight, norm, EPS))
    check_scores(with_gate(run, x, weight, None, None), x, weight, None)
