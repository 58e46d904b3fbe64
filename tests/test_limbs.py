"""Activations as two limbs of 8 bits, against numpy: interpreted, lowered and compiled, and on a GPU."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from models import rms_norm

from jaxinfer.pallas.limbs import Limbs, limbs, limbs_reference, narrowed

EPS = 1e-5
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}  # relative error of rounding
interpreted = jax.jit(partial(limbs, interpret=True), static_argnums=3)
kernel = partial(mosaic.interpret, interpreted)
quick = pytest.mark.usefixtures("quick_compiler")
both = pytest.mark.parametrize(
    "make", [jax.jit(limbs_reference, static_argnums=3), kernel], ids=["reference", "kernel"]
)


def integers(out: Limbs) -> np.ndarray:
    """256 high + low [M, D], from the bytes of words that are little-endian."""
    words = np.asarray(out.codes).astype("<i4")
    limb = words.view(np.int8).reshape(*words.shape[:3], 16).astype(np.int64)
    return (256 * limb[:, :, 0] + limb[:, :, 1]).reshape(len(words), -1)


def wanted(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales of finite numbers [M, D], in float64."""
    runs = y.astype(np.float64).reshape(len(y), -1, 32)
    largest = np.abs(runs).max(axis=2)
    scale = 2.0 ** np.maximum(np.floor(np.log2(np.where(largest > 0, largest, 2.0**-200))) - 13, -100)
    return np.rint(runs / scale[..., None]).astype(np.int64).reshape(y.shape), scale


def check_shapes(out: Limbs, m: int, width: int) -> None:
    """Also that the sums are of the integers that are there: exact, as they are below 2^24 and scales powers of 2."""
    found = [(a.shape, a.dtype) for a in (out.codes, out.scale, out.sums)]
    n = width // 16
    assert found == [((m, n, 2, 4), jnp.int32), ((m, n // 2), jnp.float32), ((m, n), jnp.float32)]
    sums = integers(out).reshape(m, n, 16).sum(axis=2)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out.sums, sums.astype(np.float32) * np.repeat(out.scale, 2, axis=1))


def check_normed(out: Limbs, x: jax.Array, weight: np.ndarray) -> None:
    """Rounding to x's dtype errs by a unit, or 2^-25 of a subnormal f16; an f32 norm by 2^-20; an integer by half."""
    y = rms_norm(np.asarray(x, np.float64), weight, EPS)
    scale, got = np.repeat(np.asarray(out.scale, np.float64), 32, axis=1), integers(out)
    rounding = (UNIT[str(x.dtype)] + 2.0**-20) * np.abs(y) + (2.0**-25 if x.dtype == jnp.float16 else 0)
    assert (np.abs(got * scale - y) <= scale / 2 + rounding).all()
    largest = np.abs(got).reshape(len(y), -1, 32).max(axis=2)
    assert ((largest >= 2**13) & (largest <= 2**14)).all()


def normal(m: int, width: int, dtype: Any = jnp.bfloat16, seed: int = 0) -> jax.Array:
    """Magnitudes over 2^12 or so, and runs over 2^20, so that small ones are rounded."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, width // 32, 32)) * 2.0 ** rng.integers(-10, 10, (m, width // 32, 1))
    return jnp.asarray(x.reshape(m, width), dtype)


@quick
@both
@pytest.mark.parametrize(
    ("m", "width", "dtype"), [(1, 1024, "bfloat16"), (3, 1280, "bfloat16"), (2, 384, "float16"), (1, 576, "float32")]
)
def test_without_a_norm_integers_are_exact(make, m, width, dtype):
    x = normal(m, width, dtype)
    out = make(x, None, 0, None)
    check_shapes(out, m, width)
    n, scale = wanted(np.asarray(x))
    np.testing.assert_array_equal(integers(out), n)
    np.testing.assert_array_equal(out.scale, scale)


@quick
@both
@pytest.mark.parametrize(
    ("m", "width", "dtype", "stack"),
    [
        (1, 1024, "bfloat16", "float32"),
        (3, 1280, "bfloat16", "bfloat16"),
        (2, 384, "float16", None),
        (1, 576, "float32", "float32"),
    ],
)
def test_a_norm_before(make, m, width, dtype, stack):
    x = normal(m, width, dtype, seed=1)
    norm = None if stack is None else jnp.asarray(1 + np.random.default_rng(2).random((3, width)), stack)
    out = make(x, norm, jnp.int32(2), EPS)
    check_shapes(out, m, width)
    check_normed(out, x, np.ones(width) if norm is None else np.asarray(norm[2], np.float64))


@quick
def test_a_row_is_the_same_in_every_batch():
    x, norm = normal(3, 1280), normal(1, 1280, jnp.float32)
    alone = [kernel(row[None], norm, 0, EPS) for row in x]
    jax.tree.map(np.testing.assert_array_equal, kernel(x, norm, 0, EPS), jax.tree.map(lambda *a: jnp.concat(a), *alone))


@quick
@both
def test_extremes(make):
    """Each in a run of its own: zeros, subnormal, tiny, huge, an outlier, and halves that are rounded to even."""
    runs = np.random.default_rng(3).uniform(-1, 1, (8, 32)).astype(np.float32)
    runs[0] = 0
    runs[1] *= 2.0**-127
    runs[2] *= 2.0**-95
    runs[3] *= 3e38
    runs[4, 5] = -1e4
    runs[5] = np.float32(2**13) + np.arange(-16, 16) / 2
    runs[6, 0] = np.nextafter(np.float32(2), np.float32(0))  # 2^14 after rounding
    runs[7] = -(2.0**-100) * np.arange(32)
    x = jnp.asarray(runs.reshape(1, 256))
    out = make(x, None, 0, None)
    check_shapes(out, 1, 256)
    n, scale = wanted(runs.reshape(1, 256))
    np.testing.assert_array_equal(integers(out), n)
    np.testing.assert_array_equal(out.scale, scale)
    assert np.isfinite(np.asarray(out.sums)[0, [*range(6), *range(8, 16)]]).all()  # those of 3e38 may well overflow
    assert not n[0, :64].any()
    assert n.max() == 2**14
    np.testing.assert_array_equal(n[0, 5 * 32 : 5 * 32 + 8], [8184, 8184, 8185, 8186, 8186, 8186, 8187, 8188])


@quick
@both
@pytest.mark.parametrize("poison", [-np.inf, np.nan])
def test_an_infinity_or_nan_is_not_lost(make, poison):
    wide = normal(4, 1280).at[1, 40].set(poison)  # XLA's CPU code drops a nan from maxima of some shapes
    assert np.isnan(limbs_reference(wide, None, 0, None).scale[1, 1])
    x = normal(2, 512).at[1, 40].set(poison)
    out = make(x, None, 0, None)
    np.testing.assert_array_equal(np.isnan(out.scale), np.arange(16) == [[-1], [1]])  # its own run alone
    np.testing.assert_array_equal(np.isnan(out.sums), np.isin(np.arange(32), [2, 3]) & [[False], [True]])
    normed = make(x, None, 0, EPS)
    assert np.isfinite(np.asarray(normed.scale[0])).all()
    assert np.isnan(np.asarray(normed.scale[1, 1]))
    if np.isnan(poison):
        assert np.isnan(np.asarray(normed.scale[1])).all()


def narrow_integers(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Multiples of 128 [M, D], and scales, in float64."""
    _, scale = wanted(y)
    units = np.rint(y.astype(np.float64) / np.repeat(scale, 32, axis=1) / 128)
    return 128 * np.minimum(units, 127).astype(np.int64), scale


@quick
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("interpret", [False, True], ids=["reference", "kernel"])
def test_narrow_integers_are_exact(interpret, pairs):
    """In pairs the codes of two tokens are the limbs of one; 128 units are one too many."""
    x = normal(2, 512).at[1, :32].set(jnp.linspace(2.0**-7 - 2, 2 - 2.0**-7, 32, dtype=jnp.bfloat16))
    made_by = partial(limbs, interpret=True) if interpret else limbs_reference
    run = jax.jit(partial(made_by, narrow=True, pairs=pairs), static_argnums=3)
    out = (partial(mosaic.interpret, run) if interpret else run)(x, None, 0, None)
    n, scale = narrow_integers(np.asarray(x))
    assert (n.min(), n.max()) == (-128 * 128, 127 * 128)
    np.testing.assert_array_equal(out.scale, 128 * scale if pairs else scale)
    sums = n.reshape(2, -1, 16).sum(axis=2) * np.repeat(scale, 2, axis=1)
    np.testing.assert_array_equal(out.sums, sums)
    np.testing.assert_array_equal(narrowed(x), jnp.asarray(n * np.repeat(scale, 32, axis=1), jnp.bfloat16))
    if pairs:
        codes = np.asarray(out.codes).astype("<i4").view(np.int8).reshape(1, -1, 2, 16).swapaxes(1, 2)
        np.testing.assert_array_equal(128 * codes.reshape(2, -1).astype(int), n)
    else:
        np.testing.assert_array_equal(integers(out), n)


def test_what_the_kernel_does_not_cover_is_refused():
    with pytest.raises(NotImplementedError, match="limbs: rows of 96 are no multiple of 64"):
        limbs(jnp.zeros((1, 96)), None, 0, None)
    with pytest.raises(ValueError, match="a norm needs its eps"):
        limbs(jnp.zeros((1, 256)), jnp.ones((1, 256)), 0, None)


# Qwen3-8B and its network, Gemma 4 31B and its, experts of three models, SmolLM2, the most.
WIDTHS = 4096, 12288, 5376, 21504, 2816, 768, 704, 2880, 576, 25600


def programs(arch: tuple[int, int]) -> Iterator[mosaic.Program]:
    """With a norm and without one."""
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    for width in WIDTHS:
        x, norm = jax.ShapeDtypeStruct((16, width), jnp.bfloat16), jax.ShapeDtypeStruct((2, width), jnp.float32)
        yield f"{width}", lambda x: limbs(x, None, 0, None), (x,)
        yield f"{width} normed", lambda x, norm, layer: limbs(x, norm, layer, EPS), (x, norm, layer)
    x = jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16)
    yield "pairs", lambda x: limbs(x, None, 0, EPS, narrow=True, pairs=True), (x,)


@pytest.mark.parametrize("arch", mosaic.ARCHS)
def test_lowered_for_a_gpu(arch):
    for _, f, args in [*list(programs(arch))[:2], *list(programs(arch))[-1:]]:
        assert "mosaic_gpu" in mosaic.lower(f, *args, arch=arch)


@mosaic.needs_ptxas
@pytest.mark.parametrize("arch", mosaic.ARCHS)
def test_compiled_for_a_gpu_without_spills(arch):
    reports = mosaic.ptxas("test_limbs", arch)
    assert reports.keys() == {name for name, *_ in programs(arch)}
    assert not {name: report for name, report in reports.items() if report[1]}


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("width", [4096, 21504, 2880, 576])
def test_on_a_gpu_at_full_size(m, width):
    x, norm = normal(m, width), 1 + jnp.abs(normal(2, width, jnp.float32, seed=1))
    out = jax.jit(limbs)(x, None, 0, None)
    check_shapes(out, m, width)
    jax.tree.map(np.testing.assert_array_equal, out, limbs_reference(x, None, 0, None))
    run = jax.jit(limbs, static_argnums=3)
    out = run(x, norm, 1, EPS)
    check_shapes(out, m, width)
    check_normed(out, x, np.asarray(norm[1], np.float64))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a: a[:1], out), run(x[:1], norm, 1, EPS))
