"""Products of many rows, grouped by expert or not, against float64: interpreted, lowered and compiled, and on a GPU."""

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

from jaxinfer.pallas.grouped import _width, beyond, grouped, items_of, permuted, reference, ungrouped
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


def product_of(x: jax.Array, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x w.T in float64, and how far off it may be.

    A weight is rounded to bf16, by 2^-9 of it; before that to 2^-17 of its group's scale, which is at most the largest
    weight. A sum in f32 is off by up to 2^-24 for each of its terms, of which there are fewer than 2^14: by 2^-12 of
    their sizes' sum, as errors of either sign do not add up. What is subnormal may be 0, scales of up to 12 times as
    much as well.
    """
    x_ = np.asarray(x, np.float64)
    size = np.abs(x_).sum(1)[:, None]
    noise = (2.0**-9 + 2.0**-12) * np.abs(x_) @ np.abs(w).T + 2.0**-15 * np.abs(w).max(1) * size
    return x_ @ w.T, noise + 2.0**-126 * (x.shape[1] + 12 * size)


def wanted(x: jax.Array, w: np.ndarray, starts: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Each expert's product [N, F], and the noise; zeros for rows behind all."""
    want, noise = np.zeros((2, len(x), w.shape[1]))
    for e in range(len(w)):
        mine = slice(tile * starts[e], tile * starts[e + 1])
        want[mine], noise[mine] = product_of(x[mine], w[e])
    return want, noise


def check(got: Any, want: np.ndarray, noise: np.ndarray) -> None:
    """A result of 16 bits is rounded by 2^-8 at most."""
    unit = 0.0 if got.dtype == jnp.float32 else 2.0**-8
    assert got.shape == want.shape
    assert len(got)
    off = np.abs(np.asarray(got, np.float64) - want)
    assert (off <= noise + unit * (np.abs(want) + noise)).all()


@partial(jax.jit, static_argnames=("tile", "combine", "dtype", "permute", "widths", "ctas"))
def interpreted(x, weights, layer, starts, **options):
    return grouped(x, weights, layer, starts, **{"dtype": jnp.float32} | options, interpret=True)


@partial(jax.jit, static_argnames=("combine", "dtype", "width", "ctas"))
def interpreted_ungrouped(x, sets, layer, **options):
    return ungrouped(x, sets, layer, **{"dtype": jnp.float32} | options, interpret=True)


kernel = partial(mosaic.interpret, interpreted)
plain_kernel = partial(mosaic.interpret, interpreted_ungrouped)


@quick
@pytest.mark.parametrize(("kinds", "width"), [({"Q4_K": 128, "Q6_K": 64}, 256), ({"MXFP4": 64, "Q8_0": 64}, 320)])
def test_against_float64(kinds, width):
    """Weights of all ways to read codes; of the other formats `test_matvec` has the tiles, a GPU the products.

    Of whole numbers every sum is exact, so that not one bit of a weight in bf16 may be wrong in even rows. A row of 320
    elements is 256 of them twice. Of the second item of rows 5 are there.
    """
    made = [packed(kind, rows, width) for kind, rows in kinds.items()]
    x = whole(21, width)
    ys = plain_kernel(x, [[w] for w, _ in made], LAYER, width=16, ctas=2)
    for y, (_, values) in zip(ys, made, strict=True):
        check(y, *product_of(x, values))
        rounded = values[::2].astype(bfloat16).astype(np.float64)
        np.testing.assert_array_equal(y[:, ::2], product_of(x, rounded)[0])


def gated(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """silu(gate) up, whose slope is below 1.2, and which takes an exp and some products in f32."""
    (a, a_noise), (b, b_noise) = parts
    act = gate("silu")[1](a)
    noise = 1.2 * a_noise * (np.abs(b) + b_noise) + np.abs(act) * b_noise
    return act * b, noise + 2.0**-20 * np.abs(act * b)


@quick
def test_gate_and_up():
    """Tiles of an expert are one product, of 48 rows and of 16; two CTAs share them and the rows of the weights."""
    tile, starts = 16, np.array([0, 1, 1, 4])
    stacks = [stack("BF16", 3, 192, 128, seed) for seed in (0, 1)]
    x = jax.random.normal(jax.random.key(5), (5 * tile, 128), jnp.bfloat16)
    options = {"tile": tile, "combine": gate("silu")[0], "dtype": jnp.bfloat16}
    args = x, [w for w, _ in stacks], LAYER, jnp.asarray(starts, jnp.int32)
    used = slice(tile * starts[-1])
    want, noise = gated([wanted(x, v, starts, tile) for _, v in stacks])
    check(kernel(*args, widths=(16, 48), ctas=2, **options)[used], want[used], noise[used])
    check(reference(*args, **options)[used], want[used], noise[used])


@quick
def test_halves_of_a_weight_with_biases_permuted():
    tile, starts = 16, np.array([0, 0, 1])
    w, v = stack("Q5_0", 2, 128, 256)
    bias = np.random.default_rng(1).standard_normal((LAYERS, 2, 128)).astype(np.float32)
    x = jax.random.normal(jax.random.key(5), (tile, 256), jnp.bfloat16)
    options = {"tile": tile, "combine": gate("silu")[0], "dtype": jnp.bfloat16, "biases": [jnp.asarray(bias)]}
    args = [w], LAYER, jnp.asarray(starts, jnp.int32)
    got = kernel(permuted(x), *args, permute=True, widths=(16,), **options)
    want, noise = wanted(x, v, starts, tile)
    want = want + bias[LAYER, 1]
    halves = gated([(want[:, half], noise[:, half]) for half in (slice(64), slice(64, 128))])
    check(reference(x, *args, **options), *halves)
    check(got, *map(permute, halves))


def permute(y: np.ndarray) -> np.ndarray:
    """By the definition: of each 16 columns, the p-th is the PERMUTED[p]-th."""
    out = np.empty_like(y)
    for column in range(y.shape[1]):
        out[:, column] = y[:, column // 16 * 16 + PERMUTED[column % 16]]
    return out


def test_items_for_all_patterns_of_empty_groups():
    """Of eight experts each has no tiles or up to seven, of which an item has three at most."""
    made = jax.jit(partial(items_of, n_tiles=32, most=3))
    for some in product((0, 1), repeat=8):
        tiles = [n * size for n, size in zip(some, (1, 2, 3, 4, 7, 1, 6, 5), strict=True)]
        starts = np.cumsum([0, *tiles])
        got = made(jnp.asarray(starts, jnp.int32))
        each = [[(e, starts[e] + i, min(3, n - i)) for i in range(0, n, 3)] for e, n in enumerate(tiles)]
        want = [item for items in each for item in items]
        assert got.starts.tolist() == np.cumsum([0, *map(len, each)]).tolist()
        assert list(zip(*(np.asarray(a)[: len(want)].tolist() for a in got[:3]), strict=True)) == want


@pytest.mark.parametrize(
    ("rows", "spans", "width"),
    [
        (1, 96, 16),
        (17, 32, 32),
        (256, 32, 64),  # 4 times 32 items for 132 processors
        (300, 96, 64),
        (512, 192, 256),
    ],
)
def test_width(rows, spans, width):
    assert _width(rows, spans, 132) == width


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
    w, x, starts = jnp.zeros((1, 2, 64, 64), jnp.bfloat16), jnp.zeros((40, 64), jnp.bfloat16), jnp.zeros(3, jnp.int32)
    run = partial(grouped, layer=0, starts=starts, tile=8, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="float32 is no type"):
        run(x, [w.astype(jnp.float32)])
    with pytest.raises(ValueError, match="2 weights make no product of 1 parts"):
        run(x, [w, w])
    with pytest.raises(ValueError, match="are not alike, of 4 axes, for x of"):
        run(x, [w, w[:, :1]], combine=jnp.multiply)
    with pytest.raises(ValueError, match="are not alike, of 3 axes, for x of"):
        ungrouped(x, [[w]], 0, dtype=jnp.float32)
    with pytest.raises(ValueError, match="x is of float16, a weight of bfloat16"):
        run(x.astype(jnp.float16), [w])
    with pytest.raises(ValueError, match="40 rows, 3 starts: no tiles of 16 of 2 experts"):
        run(x, [w], tile=16)
    with pytest.raises(ValueError, match="40 rows, 2 starts: no tiles"):
        run(x, [w], starts=starts[1:])
    with pytest.raises(ValueError, match="tile=8 is no multiple of 16 that divides 256"):
        run(x, [w])
    for width in (24, 288):
        with pytest.raises(ValueError, match=f"{width=} is neither 16 nor a multiple of 32 up to 256"):
            ungrouped(x, [[w[0]]], 0, dtype=jnp.float32, width=width)
    with pytest.raises(ValueError, match="results of float32 are not permuted"):
        run(x[:32], [w], tile=16, permute=True)
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

            def f(x, weights, layer, starts, biases, options=options):
                return grouped(x, weights, layer, starts, tile=tile, biases=biases, **options)

            ints = shape(dtype=jnp.int32), shape(experts + 1, dtype=jnp.int32)
            yield f"{kind}, {name}", f, (x, weights, *ints, biases)


def ungrouped_launches() -> Iterator[mosaic.Program]:
    """Few rows, whose scales are loaded ahead, and many: q, k and v of an 8B model, and gate and up."""
    int32 = jax.ShapeDtypeStruct((), jnp.int32)
    qkv = [[shapes("Q4_K", 4096, 4096)], [shapes("Q4_K", 1024, 4096)], [shapes("Q6_K", 1024, 4096)]]
    for rows in (5, 300, 2048):
        x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
        for name, sets, options in (
            ("q, k, v", qkv, {}),
            ("gate, up", [[shapes("Q4_K", 12288, 4096)] * 2], {"combine": gate("silu")[0]}),
        ):
            yield f"{name}, {rows} rows", partial(ungrouped, dtype=jnp.bfloat16, **options), (x, sets, int32)


def programs(arch: tuple[int, int]) -> Iterator[mosaic.Program]:
    """Most and few codes; not all formats, as a kernel takes 10 s."""
    yield from launches(("BF16", "Q4_K", "Q6_K", "Q8_0"))
    yield from ungrouped_launches()


@pytest.mark.parametrize("name", ["BF16, gate and up", "Q5_1, halves", "q, k, v, 5 rows", "gate, up, 300 rows"])
def test_lowered_for_a_gpu(name):
    (one,) = (program[1:] for program in (*launches(("BF16", "Q5_1")), *ungrouped_launches()) if program[0] == name)
    assert "mosaic_gpu" in mosaic.lower(one[0], *one[1], arch=(9, 0))


@mosaic.needs_ptxas
def test_compiled_for_a_gpu_without_spills():
    reports = mosaic.ptxas("test_grouped", (9, 0))
    assert reports.keys() == {name for name, *_ in programs((9, 0))}
    assert {name: spills for name, (_, spills) in reports.items() if spills} == {}


def starts_of(counts: np.ndarray, tile: int) -> np.ndarray:
    """Of experts with so many rows each."""
    return np.cumsum([0, *-(-counts // tile)])


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
    starts = starts_of(counts[skew], 64)
    n = 64 * (starts[-1] + 3)  # tiles behind all
    w, values = stack(kind, experts, rows, width)
    dtype = jnp.float16 if kind == "F16" else jnp.bfloat16
    x = jnp.asarray(rng.standard_normal((n, width)), dtype).at[::2].set(whole(n // 2, width, dtype))
    ordered = x if kind in ("BF16", "F16") else permuted(x)
    used, every = slice(64 * starts[-1]), slice(0, 64 * starts[-1], 32)
    finite = np.isfinite(values).all((0, 2))
    want, noise = wanted(x[every], values[:, finite], starts, 2)

    def run(tile: int, **options: Any) -> np.ndarray:
        scaled = jnp.asarray(starts * (64 // tile), jnp.int32)
        return np.asarray(grouped(ordered, [w], LAYER, scaled, tile=tile, dtype=jnp.float32, **options))

    got = run(64)
    check(got[every][:, finite], want, noise)
    for tile, options in ((16, {"widths": (32, 48, 256)}), (64, {}), (32, {"widths": (96,)})):
        np.testing.assert_array_equal(run(tile, **options)[used], got[used])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["BF16", "Q4_K", "Q6_K", "MXFP4"])
def test_gate_and_up_on_a_gpu(kind):
    experts, rows, width, tile = 16, 768, 2048, 32
    starts = starts_of(np.random.default_rng(1).integers(0, 300, experts), tile)
    stacks = [stack(kind, experts, rows, width, seed) for seed in (0, 1)]
    x = jax.random.normal(jax.random.key(0), (tile * (starts[-1] + 3), width), jnp.bfloat16) / 16
    options = {"combine": gate("silu")[0], "dtype": jnp.bfloat16, "permute": kind != "BF16"}
    ordered = x if kind == "BF16" else permuted(x)
    got = grouped(ordered, [w for w, _ in stacks], LAYER, jnp.asarray(starts, jnp.int32), tile=tile, **options)
    every = slice(0, tile * starts[-1], 16)
    even = slice(None, None, 2)  # rows of the weight, so that no product is infinite
    want, noise = gated([wanted(x[every], v[:, even], starts, 2) for _, v in stacks])
    y = np.asarray(got, np.float64)
    if kind != "BF16":
        y = y.reshape(len(y), -1, 16)[..., np.argsort(PERMUTED)].reshape(y.shape)
    check(jnp.asarray(y[every][:, even], jnp.bfloat16), want, noise)


def single(kind: str, rows: int, width: int, seed: int = 0) -> Stack:
    """A weight [R, F, D], and values of its layer LAYER in float64, of which odd rows may be infinite."""
    if kind in ("BF16", "F16"):
        w, values = stack(kind, 1, rows, width, seed)
        return w[:, 0], values[0]
    return packed(kind, rows, width, seed)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "rows", "width"),
    [
        *((kind, 1024, 4096) for kind in ("BF16", "F16", *TILES)),
        *((kind, *shape) for kind in ("Q4_K", "Q6_K") for shape in ((12288, 4096), (4096, 12288))),
        *((kind, 2880, 704) for kind in ("BF16", "Q8_0")),
    ],
)
def test_a_row_has_the_same_bits_among_any_number_of_rows_on_a_gpu(kind, rows, width):
    """Of all rows the bits, of some the values: alone, in the last tile and in full ones, and for any width."""
    w, values = single(kind, rows, width)
    dtype = jnp.float16 if kind == "F16" else jnp.bfloat16
    x = jax.random.normal(jax.random.key(0), (2048, width)).astype(dtype)

    def run(m: int, **options: Any) -> np.ndarray:
        (y,) = ungrouped(x[:m], [[w]], LAYER, dtype=jnp.float32, **options)
        assert y.shape == (m, rows)
        return np.asarray(y)

    got = run(2048)
    some = slice(None, None, 8)
    check(got[::256][:, some], *product_of(x[::256], values[some]))
    for m, options in ((1, {}), (5, {}), (17, {}), (300, {}), (300, {"width": 256}), (2048, {"width": 96})):
        np.testing.assert_array_equal(run(m, **options), got[:m])


@pytest.mark.gpu
def test_launches_of_a_layer_on_a_gpu():
    """q, k, v, and gate and up, of 5 to 2048 rows: with the same bits in all, and as products alone for q, k, v."""
    qkv = [
        single(kind, rows, 4096, i) for i, (kind, rows) in enumerate((("Q4_K", 4096), ("Q4_K", 1024), ("Q6_K", 1024)))
    ]
    ups = [single("Q4_K", 12288, 4096, seed) for seed in (3, 4)]
    x = jax.random.normal(jax.random.key(0), (2048, 4096), jnp.bfloat16) / 64

    def run(m: int) -> list[np.ndarray]:
        q, k, v = ungrouped(x[:m], [[w] for w, _ in qkv], LAYER, dtype=jnp.float32)
        (h,) = ungrouped(x[:m], [[w for w, _ in ups]], LAYER, combine=gate("silu")[0], dtype=jnp.bfloat16)
        return [np.asarray(y) for y in (q, k, v, h)]

    got, some = run(2048), slice(None, None, 8)
    for y, (w, values) in zip(got, qkv, strict=False):
        check(y[::256][:, some], *product_of(x[::256], values[some]))
        np.testing.assert_array_equal(ungrouped(x[:40], [[w]], LAYER, dtype=jnp.float32)[0], y[:40])
    check(got[3][::256][:, some], *gated([product_of(x[::256], v[some]) for _, v in ups]))
    for m in (5, 17, 300):
        for y, all_ in zip(run(m), got, strict=True):
            np.testing.assert_array_equal(y, all_[:m])
