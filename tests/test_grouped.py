"""Products of rows grouped by expert, against float64: interpreted, lowered and compiled, and on a GPU."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from ml_dtypes import bfloat16
from test_matvec import LAYER, LAYERS, gate, packed, shapes

from jaxinfer.pallas.grouped import beyond, grouped, items_of, permuted, reference
from jaxinfer.pallas.registers import PERMUTED
from jaxinfer.pallas.tiles import TILES
from jaxinfer.quants import Packed

quick = pytest.mark.usefixtures("quick_compiler")
Stack = tuple[Any, np.ndarray]  # a weight [R, E, F, D], and values of its layer LAYER in float64


def stack(kind: str, experts: int, rows: int, width: int, seed: int = 0) -> Stack:
    """Even rows of packed weights have scales that are powers of 2, others any; see test_matvec.packed."""
    if kind in ("BF16", "F16"):
        made = jax.random.normal(jax.random.key(seed), (LAYERS, experts, rows, width))
        w = made.astype(jnp.bfloat16 if kind == "BF16" else jnp.float16)
        return w, np.asarray(w[LAYER], np.float64)
    w, values = packed(kind, experts * rows, width, seed)
    w = jax.tree.map(lambda p: p.reshape(LAYERS, experts, rows, *p.shape[2:]), w)
    return w, values.reshape(experts, rows, width)


def whole(n: int, width: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(n).integers(-3, 4, (n, width)), dtype)


def wanted(x: jax.Array, w: np.ndarray, expert_of_tile: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """The product [N, F] in float64, zeros for unused tiles, and how far off it may be.

    A weight is rounded to bf16, by 2^-9 of it; before that to 2^-17 of its group's scale, which is at most the largest
    weight. A sum in f32 is off by up to 2^-24 for each of its terms, of which there are fewer than 2^12. What is
    subnormal may be 0, scales of up to 12 times as much as well.
    """
    rows = np.asarray(x, np.float64).reshape(-1, tile, x.shape[1])
    used = (expert_of_tile >= 0) & (expert_of_tile < len(w))
    want, noise = np.zeros((2, len(rows), tile, w.shape[1]))
    for t in np.flatnonzero(used):
        one = w[expert_of_tile[t]]
        want[t] = rows[t] @ one.T
        size = np.abs(rows[t]).sum(1)[:, None]
        noise[t] = (2.0**-9 + 2.0**-12) * np.abs(rows[t]) @ np.abs(one).T + 2.0**-15 * np.abs(one).max(1) * size
        noise[t] += 2.0**-126 * (x.shape[1] + 12 * size)
    return want.reshape(len(x), -1), noise.reshape(len(x), -1)


def rows_of(expert_of_tile: np.ndarray, experts: int, tile: int) -> np.ndarray:
    return np.repeat((expert_of_tile >= 0) & (expert_of_tile < experts), tile)


def check(got: Any, want: np.ndarray, noise: np.ndarray, used: np.ndarray) -> None:
    """A result of 16 bits is rounded by 2^-8 at most."""
    unit = 0.0 if got.dtype == jnp.float32 else 2.0**-8
    assert got.shape == want.shape
    assert used.any()
    off = np.abs(np.asarray(got, np.float64) - want)
    assert (off <= noise + unit * (np.abs(want) + noise))[used].all()


@partial(jax.jit, static_argnames=("tile", "combine", "dtype", "permute", "widths", "ctas"))
def interpreted(x, weights, layer, expert_of_tile, **options):
    return grouped(x, weights, layer, expert_of_tile, **{"dtype": jnp.float32} | options, interpret=True)


kernel = partial(mosaic.interpret, interpreted)


@quick
@pytest.mark.parametrize(("kind", "width"), [("Q4_K", 256), ("Q6_K", 256), ("MXFP4", 320), ("Q8_0", 448)])
def test_packed_against_float64(kind, width):
    """Of whole numbers every sum is exact, so that not one bit of a weight in bf16 may be wrong in even rows.

    A row of 320 elements is 256 of them twice; a tile without an expert lies between those of two.
    """
    tile, e = 16, np.array([1, -1, 0])
    w, values = stack(kind, 2, 64, width)
    x = whole(3 * tile, width)
    got = kernel(permuted(x), [w], LAYER, jnp.asarray(e), tile=tile, widths=(16,), ctas=1)
    used = rows_of(e, 2, tile)
    check(got, *wanted(x, values, e, tile), used)
    want, _ = wanted(x, values.astype(bfloat16).astype(np.float64), e, tile)
    np.testing.assert_array_equal(got[used, ::2], want[used, ::2])


def gated(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """silu(gate) up, whose slope is below 1.2, and which takes an exp and some products in f32."""
    (a, a_noise), (b, b_noise) = parts
    act = gate("silu")[1](a)
    noise = 1.2 * a_noise * (np.abs(b) + b_noise) + np.abs(act) * b_noise
    return act * b, noise + 2.0**-20 * np.abs(act * b)


@quick
def test_gate_and_up():
    """Tiles of an expert are one product, of 48 rows and of 16; two CTAs share them and the rows of the weights."""
    tile, e = 16, np.array([2, 2, 2, 3, 0])
    stacks = [stack("BF16", 3, 192, 128, seed) for seed in (0, 1)]
    x = jax.random.normal(jax.random.key(5), (5 * tile, 128), jnp.bfloat16)
    options = {"tile": tile, "combine": gate("silu")[0], "dtype": jnp.bfloat16}
    got = kernel(x, [w for w, _ in stacks], LAYER, jnp.asarray(e), widths=(16, 48), ctas=2, **options)
    used = rows_of(e, 3, tile)
    check(got, *gated([wanted(x, v, e, tile) for _, v in stacks]), used)
    same = reference(x, [w for w, _ in stacks], LAYER, jnp.asarray(e).clip(0, 2), **options)
    check(same, *gated([wanted(x, v, e, tile) for _, v in stacks]), used)


@quick
def test_halves_of_a_weight_with_biases_permuted():
    tile, e = 16, np.array([1])
    w, v = stack("Q5_0", 2, 128, 256)
    bias = np.random.default_rng(1).standard_normal((LAYERS, 2, 128)).astype(np.float32)
    x = jax.random.normal(jax.random.key(5), (tile, 256), jnp.bfloat16)
    options = {"tile": tile, "combine": gate("silu")[0], "dtype": jnp.bfloat16, "biases": [jnp.asarray(bias)]}
    got = kernel(permuted(x), [w], LAYER, jnp.asarray(e), permute=True, widths=(16,), **options)
    want, noise = wanted(x, v, e, tile)
    want = want + bias[LAYER, 1]
    halves = gated([(want[:, half], noise[:, half]) for half in (slice(64), slice(64, 128))])
    used = np.ones(tile, bool)
    check(reference(x, [w], LAYER, jnp.asarray(e), **options), *halves, used)
    want, noise = map(permute, halves)
    check(got, want, noise, used)


def permute(y: np.ndarray) -> np.ndarray:
    """By the definition: of each 16 columns, the p-th is the PERMUTED[p]-th."""
    out = np.empty_like(y)
    for column in range(y.shape[1]):
        out[:, column] = y[:, column // 16 * 16 + PERMUTED[column % 16]]
    return out


@quick
def test_a_row_depends_on_no_other():
    w, _ = stack("Q4_K", 2, 64, 256)
    x = permuted(jax.random.normal(jax.random.key(0), (32, 256), jnp.bfloat16))
    e = jnp.array([1, 1])
    got = kernel(x, [w], LAYER, e, tile=16, widths=(32,))
    other = kernel(x.at[1:31].set(jnp.nan), [w], LAYER, e, tile=16, widths=(32,))
    np.testing.assert_array_equal(other[::31], got[::31])
    assert np.isnan(other[1:31]).all()


def test_items_for_all_patterns_of_empty_groups():
    """Of eight experts each has no tiles or up to seven, of which an item has three at most."""
    made = jax.jit(partial(items_of, experts=8, most=3))
    for some in product((0, 1), repeat=8):
        tiles = [n * size for n, size in zip(some, (1, 2, 3, 4, 7, 1, 6, 5), strict=True)]
        e = np.repeat(np.arange(8), tiles)
        got = made(jnp.asarray(np.pad(e, (0, 32 - len(e)), constant_values=8 if some[0] else -1), jnp.int32))
        want = []
        for expert, n in enumerate(tiles):
            first = sum(tiles[:expert])
            want += [(expert, first + i, min(3, n - i)) for i in range(0, n, 3)]
        number = int(got.number[0])
        assert number == len(want)
        assert list(zip(*(np.asarray(a)[:number].tolist() for a in got[:3]), strict=True)) == want


def test_what_is_beyond_the_kernel():
    def plain(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct((2, 4, *shape), dtype)

    assert beyond([shapes("Q4_K", 64, 256), shapes("Q6_K", 64, 256)]) is None
    assert beyond([plain(704, 2880), plain(704, 2880)]) is None
    assert beyond([plain(64, 64, dtype=jnp.float32)]) == "float32 is no type of its operands"
    assert beyond([plain(64, 96)]) == "64 x 96 are not rows by 64 of elements by 64, 64 at least"
    for rows, width in ((32, 256), (64, 192), (64, 288)):
        assert beyond([shapes("Q8_0", rows, width)]) == (
            f"{rows} x {width} are not rows by 64 of elements by 64, 256 at least"
        )
    known = shapes("Q4_0", 64, 256)
    assert beyond([replace(known, format=replace(known.format, name="Q1_0"))]) == "Q1_0 is read by no kernel"
    assert beyond([known, plain(64, 256)]) == "one weight is packed, another is not"


def test_bad_input_is_refused():
    w, x, e = jnp.zeros((1, 2, 64, 64), jnp.bfloat16), jnp.zeros((32, 64), jnp.bfloat16), jnp.zeros(2, jnp.int32)
    run = partial(grouped, layer=0, expert_of_tile=e, tile=16, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="float32 is no type"):
        run(x, [w.astype(jnp.float32)])
    with pytest.raises(ValueError, match="make no product of 1 parts"):
        run(x, [w, w])
    with pytest.raises(ValueError, match="make no product of 2 parts"):
        run(x, [w, w[:, :1]], combine=jnp.multiply)
    with pytest.raises(ValueError, match="x is of float16, a weight of bfloat16"):
        run(x.astype(jnp.float16), [w])
    with pytest.raises(ValueError, match="32 rows are not 2 tiles of 32"):
        run(x, [w], tile=32)
    with pytest.raises(ValueError, match="tile=16 is no multiple of 16 that divides 24"):
        run(x, [w], widths=(24,))
    with pytest.raises(ValueError, match="results of float32 are not permuted"):
        run(x, [w], permute=True)
    with pytest.raises(NotImplementedError, match="64 x 64 are not rows by 128"):
        run(x, [w], combine=jnp.multiply)


def launches(kinds: tuple[str, ...]) -> Iterator[mosaic.Program]:
    """Down, gate and up, and both in one weight with biases, of some rows that are no multiple of 128."""
    experts, tile, tiles = 8, 32, 16

    def shape(*dims: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype)

    for kind in kinds:
        plain, k_quant = kind in ("BF16", "F16"), "K" in kind or "XS" in kind
        width = 768 if k_quant else 704
        x = shape(tiles * tile, width, dtype=jnp.float16 if kind == "F16" else jnp.bfloat16)

        def weight(rows: int, kind: str = kind, plain: bool = plain, width: int = width, x: Any = x) -> Any:
            if plain:
                return shape(LAYERS, experts, rows, width, dtype=x.dtype)
            flat = shapes(kind, experts * rows, width)
            planes = {k: shape(LAYERS, experts, rows, *p.shape[2:], dtype=p.dtype) for k, p in flat.planes.items()}
            return Packed(planes, flat.format)

        act = gate("silu")[0]
        for name, weights, biases, options in (
            ("down", [weight(704)], None, {"dtype": jnp.float32}),
            ("gate and up", [weight(704)] * 2, None, {"combine": act, "dtype": x.dtype, "permute": not plain}),
            ("halves", [weight(384)], [shape(LAYERS, experts, 384)], {"combine": act, "dtype": x.dtype}),
        ):

            def f(x, weights, layer, e, biases, options=options):
                return grouped(x, weights, layer, e, tile=tile, biases=biases, **options)

            ints = shape(dtype=jnp.int32), shape(tiles, dtype=jnp.int32)
            yield f"{kind}, {name}", f, (x, weights, *ints, biases)


def programs(arch: tuple[int, int]) -> Iterator[mosaic.Program]:
    """Both sizes of groups, most and few codes; not all formats, as a kernel takes 10 s."""
    yield from launches(("BF16", "Q4_K", "Q6_K", "Q8_0"))


@pytest.mark.parametrize("kind", ["BF16", "Q6_K", "Q5_1"])
def test_lowered_for_a_gpu(kind):
    for _, f, args in list(launches((kind,)))[:2]:
        assert "mosaic_gpu" in mosaic.lower(f, *args, arch=(9, 0))


@mosaic.needs_ptxas
def test_compiled_for_a_gpu_without_spills():
    """But for 8 bytes in two programs of formats with the most codes, whose cost is not measured."""
    reports = mosaic.ptxas("test_grouped", (9, 0))
    assert reports.keys() == {name for name, *_ in programs((9, 0))}
    known = {"Q6_K, halves": 8, "Q8_0, halves": 8}
    assert {name: spills for name, (_, spills) in reports.items() if spills > known.get(name, 0)} == {}


def layout(counts: np.ndarray, tile: int, spare: int = 3) -> np.ndarray:
    """Experts of tiles for so many rows of each, and tiles that are unused."""
    return np.pad(np.repeat(np.arange(len(counts)), -(-counts // tile)), (0, spare), constant_values=-1)


@pytest.mark.gpu
@pytest.mark.parametrize("skew", ["even", "uneven", "one"])
@pytest.mark.parametrize(
    ("kind", "rows", "width"),
    [
        *((kind, 768, 2048) for kind in ("BF16", *TILES)),
        *((kind, 2048, 768) for kind in ("BF16", "F16", "Q4_K", "Q6_K")),
        *((kind, 704, 2816) for kind in ("BF16", "Q8_0", "Q4_K")),
        *((kind, 2880, 2880) for kind in ("BF16", "MXFP4")),
        *((kind, 2816, 704) for kind in ("BF16", "Q8_0", "Q5_0")),
    ],
)
def test_on_a_gpu_at_full_size(kind, rows, width, skew):
    """Some rows of each used tile against float64; and all bits of other tiles and widths, and of another run."""
    experts = 16
    rng = np.random.default_rng(0)
    counts = {"even": np.full(experts, 128), "one": np.eye(experts, dtype=int)[3] * 2048}
    counts["uneven"] = rng.multinomial(2048, 0.6 ** np.arange(experts) * 0.4 / (1 - 0.6**experts))
    e = layout(counts[skew], 64)
    w, values = stack(kind, experts, rows, width)
    dtype = jnp.float16 if kind == "F16" else jnp.bfloat16
    x = jnp.asarray(rng.standard_normal((len(e) * 64, width)), dtype).at[::2].set(whole(len(e) * 32, width, dtype))
    ordered = x if kind in ("BF16", "F16") else permuted(x)
    run = partial(grouped, ordered, [w], LAYER, dtype=jnp.float32)
    got = run(jnp.asarray(e), tile=64)
    used = rows_of(e, experts, 64)
    every = np.arange(len(x)) % 32 < 2
    want, noise = wanted(x[every], values, np.repeat(e, 2), 2)
    got_ = np.asarray(got)
    finite = np.isfinite(values).all((0, 2))
    check(got_[every][:, finite], want[:, finite], noise[:, finite], used[every])
    for tile, widths in ((16, (32, 48, 256)), (64, None), (32, (96,))):
        other = run(jnp.asarray(np.repeat(e, 64 // tile)), tile=tile, widths=widths)
        np.testing.assert_array_equal(np.asarray(other)[used], got_[used])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["BF16", "Q4_K", "Q6_K", "MXFP4"])
def test_gate_and_up_on_a_gpu(kind):
    experts, rows, width, tile = 16, 768, 2048, 32
    e = layout(np.random.default_rng(1).integers(0, 300, experts), tile)
    stacks = [stack(kind, experts, rows, width, seed) for seed in (0, 1)]
    x = jax.random.normal(jax.random.key(0), (len(e) * tile, width), jnp.bfloat16) / 16
    options = {"combine": gate("silu")[0], "dtype": jnp.bfloat16, "permute": kind != "BF16"}
    ordered = x if kind == "BF16" else permuted(x)
    got = grouped(ordered, [w for w, _ in stacks], LAYER, jnp.asarray(e), tile=tile, **options)
    used, every = rows_of(e, experts, tile), np.arange(len(x)) % tile < 2
    even = slice(None, None, 2)  # rows of the weight, so that no product is infinite
    want, noise = gated([wanted(x[every], v[:, even], e, 2) for _, v in stacks])
    y = np.asarray(got, np.float64)
    if kind != "BF16":
        y = y.reshape(len(y), -1, 16)[..., np.argsort(PERMUTED)].reshape(y.shape)
    check(jnp.asarray(y[every][:, even], jnp.bfloat16), want, noise, used[every])
