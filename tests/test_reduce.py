"""Weighted sums of rows from anywhere, bit for bit those of numpy in sequence: interpreted, lowered, on a GPU."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest

from jaxinfer.pallas.reduce import reduce, reduce_reference

interpreted = partial(mosaic.interpret, jax.jit(partial(reduce, interpret=True), static_argnames="dtype"))
quick = pytest.mark.usefixtures("quick_compiler")
both = pytest.mark.parametrize(
    "make", [jax.jit(reduce_reference, static_argnames="dtype"), interpreted], ids=["reference", "kernel"]
)


def normal(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def operands(m: int, used: int, width: int, dtype: Any, *, spare: int = 5) -> tuple[jax.Array, ...]:
    """Rows in any order, of which some are nobody's; every third token is padding."""
    rng = np.random.default_rng(m + used)
    place = rng.permutation(m * used + spare)[: m * used].reshape(m, used).astype(np.int32)
    valid = np.arange(m) % 3 != 1
    rows = normal(m * used + spare, width, dtype=dtype)
    return rows, jnp.asarray(place), jnp.abs(normal(m, used, seed=1)), jnp.asarray(valid)


def wanted(rows, place, weights, valid, shared=None, residual=None, *, dtype: Any) -> np.ndarray:
    """As numpy adds f32, one after the other, each product and each sum rounded."""
    rows, place, weights = np.asarray(rows).astype(np.float32), np.asarray(place), np.asarray(weights)
    total = np.zeros((len(place), rows.shape[1]), np.float32)
    for a in range(place.shape[1]):
        total = total + weights[:, a, None] * rows[place[:, a]]
    total = np.where(np.asarray(valid)[:, None], total, np.float32(0))
    for more in (shared, residual):
        total = total if more is None else total + np.asarray(more).astype(np.float32)
    assert total.dtype == np.float32
    return total.astype(dtype)


def check_bits(got: jax.Array, want: np.ndarray) -> None:
    assert got.dtype == want.dtype
    kind = {2: np.int16, 4: np.int32}[want.itemsize]
    np.testing.assert_array_equal(np.asarray(got).view(kind), want.view(kind))


@quick
@both
@pytest.mark.parametrize(
    ("m", "used", "width", "rows", "shared", "residual", "dtype"),
    [
        (1, 8, 192, "bfloat16", None, None, "float32"),
        (5, 1, 64, "float32", "bfloat16", "bfloat16", "bfloat16"),
        (6, 4, 704, "bfloat16", None, "float32", "bfloat16"),
        (33, 2, 64, "float16", "float32", None, "float16"),
    ],
)
def test_bit_for_bit_as_one_after_the_other(make, m, used, width, rows, shared, residual, dtype):
    args = operands(m, used, width, rows)
    more = {
        name: normal(m, width, dtype=kind, seed=i)
        for i, (name, kind) in enumerate({"shared": shared, "residual": residual}.items())
        if kind
    }
    check_bits(make(*args, **more, dtype=np.dtype(dtype)), wanted(*args, **more, dtype=np.dtype(dtype)))


def test_these_sums_tell_a_contracted_product():
    rows, place, weights, _ = (np.asarray(a) for a in operands(5, 1, 64, jnp.float32))
    rounded = (weights * rows[place[:, 0]]) + np.float32(1)
    # exact products and their sums with 1 take more than the 53 bits of float64 at times, which one in 2^28 can see
    assert (rounded != (np.float64(weights) * rows[place[:, 0]] + 1).astype(np.float32)).any()


@quick
@both
def test_a_gate_against_float64(make):
    rows, place, weights, valid = operands(4, 2, 128, jnp.bfloat16)
    shared, gate, residual = normal(4, 128, seed=2), 3 * normal(4, seed=3), normal(4, 128, seed=4)
    got = make(rows, place, weights, valid, shared=shared, gate=gate, residual=residual, dtype=jnp.float32)
    terms = np.float64(weights)[..., None] * np.asarray(rows).astype(np.float64)[np.asarray(place)]
    last = np.float64(shared) / (1 + np.exp(-np.float64(gate)))[:, None]
    terms = np.concatenate([np.where(np.asarray(valid)[:, None, None], terms, 0), last[:, None], residual[:, None]], 1)
    # 2 products, 4 sums and a sigmoid of some 4 units; each rounding errs by half a unit of what is there at most
    assert (np.abs(got - terms.sum(1)) <= 6 * 2.0**-23 * np.abs(terms).sum(1)).all()


@quick
@both
def test_terms_are_added_in_the_order_of_choice(make):
    values = np.float32([2**24, 1, 1.5, -(2**24)])
    place = np.array(list(itertools.permutations(range(4))), np.int32)
    rows = jnp.broadcast_to(values[:, None], (4, 64))
    args = rows, jnp.asarray(place), jnp.ones(place.shape), jnp.ones(len(place), bool)
    want = wanted(*args, dtype=np.dtype("float32"))
    assert len(set(want[:, 0].tolist())) > 2  # the order does show
    check_bits(make(*args, dtype=np.dtype("float32")), want)
    ones = jnp.ones((len(place), 64))
    swallowed = make(*args, shared=ones, residual=-(2.0**24) * ones, dtype=np.dtype("float32"))
    check_bits(swallowed, want + np.float32(1) - np.float32(2**24))  # the shared expert before the residual


@quick
@both
def test_padding_has_no_experts(make):
    rows, place, weights, valid = operands(7, 2, 64, jnp.float32)
    pads = ~np.asarray(valid)
    rows, weights = rows.at[place[pads]].set(jnp.nan), weights.at[pads].set(jnp.inf)
    got = make(rows, place, weights, valid, residual=jnp.ones((7, 64)), dtype=jnp.float32)
    assert (np.asarray(got)[pads] == 1).all()
    assert np.isfinite(got).all()


@quick
def test_a_token_has_the_same_bits_in_every_batch():
    rows, place, weights, valid = operands(6, 4, 704, jnp.bfloat16)
    full = interpreted(rows, place, weights, valid, dtype=jnp.bfloat16)
    one = slice(2, 3)
    alone = interpreted(rows[place[2]], jnp.arange(4)[None], weights[one], valid[one], dtype=jnp.bfloat16)
    check_bits(full[one], np.asarray(alone))


def test_what_the_kernel_does_not_cover_is_refused():
    def call(width: int, n: int = 4, **more: Any) -> Any:
        shapes = ((n, width), jnp.bfloat16), ((1, 4), jnp.int32), ((1, 4), jnp.float32), ((1,), jnp.bool_)
        args = (jax.ShapeDtypeStruct(*s) for s in shapes)
        return jax.eval_shape(partial(reduce, **more, dtype=jnp.bfloat16), *args)

    with pytest.raises(NotImplementedError, match="reduce: 4 rows of 96 are not by 64"):
        call(96)
    with pytest.raises(NotImplementedError, match="2\\^31 elements"):
        call(2048, 2**20)
    with pytest.raises(ValueError, match="a gate is of a shared expert"):
        call(64, gate=jnp.ones(1))


def programs(arch: tuple[int, int]) -> Iterator[mosaic.Program]:
    """Widths of published models, with and without all that is added; prefill and decoding."""

    def shape(*dims: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype)

    def plain(*args: Any) -> jax.Array:
        return reduce(*args, dtype=jnp.bfloat16)

    def full(rows, place, weights, valid, shared, gate, residual) -> jax.Array:
        return reduce(rows, place, weights, valid, shared=shared, gate=gate, residual=residual, dtype=jnp.bfloat16)

    for m, used, width, dtype in (
        (8192, 8, 2048, jnp.bfloat16),
        (4096, 16, 2816, jnp.float32),
        (2048, 4, 2880, jnp.bfloat16),
        (1, 8, 2048, jnp.float32),
        (1, 1, 64, jnp.bfloat16),
    ):
        args = shape(m * used, width, dtype=dtype), shape(m, used, dtype=jnp.int32), shape(m, used, dtype=jnp.float32)
        args = *args, shape(m, dtype=jnp.bool_)
        more = shape(m, width), shape(m, dtype=jnp.float32), shape(m, width)
        yield f"{m} x {used} x {width}", plain, args
        yield f"{m} x {used} x {width} and more", full, (*args, *more)


@pytest.mark.parametrize("arch", [(8, 0), (9, 0)])
def test_lowered_for_a_gpu(arch):
    for _, f, args in list(programs(arch))[1::4]:
        assert "mosaic_gpu" in mosaic.lower(f, *args, arch=arch)


@mosaic.needs_ptxas
@pytest.mark.parametrize("arch", mosaic.ARCHS)
def test_compiled_for_a_gpu_without_spills(arch):
    reports = mosaic.ptxas("test_reduce", arch)
    assert reports.keys() == {name for name, *_ in programs(arch)}
    assert not {name: report for name, report in reports.items() if report[1]}


@pytest.mark.gpu
@pytest.mark.parametrize("used", [1, 4, 8])
@pytest.mark.parametrize("m", [1, 5, 33, 257, 4096])
@pytest.mark.parametrize("width", [2048, 2880])
def test_on_a_gpu_at_full_size(width, m, used):
    args = operands(m, used, width, jnp.bfloat16)
    run = jax.jit(reduce, static_argnames="dtype")
    more = {"shared": normal(m, width, seed=2, dtype=jnp.bfloat16), "residual": normal(m, width, seed=3)}
    for dtype in (np.dtype("float32"), np.dtype(jnp.bfloat16)):
        got = run(*args, **more, dtype=dtype)
        check_bits(got, wanted(*args, **more, dtype=dtype))
        check_bits(run(*args, **more, dtype=dtype), np.asarray(got))  # and again
