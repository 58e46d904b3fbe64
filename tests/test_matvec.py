"""Products of a few tokens with packed weights, against float64: interpreted, lowered and compiled, and on a GPU."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from test_limbs import integers

from jaxinfer.layers.mlp import clamped_gate, gelu_gate, silu_gate
from jaxinfer.pallas.limbs import Limbs, limbs, limbs_reference
from jaxinfer.pallas.matvec import beyond, product
from jaxinfer.pallas.tiles import TILES
from jaxinfer.quants import FORMATS, Packed

LAYERS, LAYER = 2, 1
quick = pytest.mark.usefixtures("quick_compiler")


def packed(kind: str, rows: int, width: int, seed: int = 0, every: int = 1) -> tuple[Packed, np.ndarray]:
    """A stack of any codes and any scales, and of its layer LAYER some rows in float64 by gguf-py, of the same bytes.

    Numbers of even rows are powers of 2 of both signs, so that products with small integers are exact in f32. Odd rows
    have any finite ones; MXFP4's exponents are subnormal there, small and large.
    """
    kind_, rng = GGMLQuantizationType[kind], np.random.default_rng(seed)
    form = FORMATS[kind_]
    raw = np.frombuffer(bytearray(rng.bytes(LAYERS * rows * width // form.block * form.size)), np.uint8)
    raw = raw.reshape(LAYERS, rows, -1, form.size)
    planes = form.split(raw)
    for name, plane in planes.items():
        even, odd = plane[:, ::2], plane[:, 1::2]
        if plane.dtype == np.float16:
            even[...] = rng.choice([-1, 1], even.shape) * 2.0 ** rng.integers(-1, 2, even.shape)
            odd[~np.isfinite(odd)] = -65504
        elif kind == "MXFP4" and name == "e":
            even[...], odd[...] = rng.integers(120, 127, even.shape), rng.integers(0, 200, odd.shape)
            odd[:, 0] %= 2
    values = dequantize(raw[LAYER, ::every].reshape(-(-rows // every), -1), kind_).astype(np.float64)
    return Packed({name: jnp.asarray(plane) for name, plane in planes.items()}, form), values


def activations(m: int, width: int, seed: int = 0) -> jax.Array:
    """The first token has small integers, the others magnitudes over 2^12 or so, and runs over 2^10."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, width // 32, 32)) * 2.0 ** rng.integers(-5, 5, (m, width // 32, 1))
    x[0] = rng.integers(-3, 4, x[0].shape)
    return jnp.asarray(x.reshape(m, width), jnp.bfloat16)


@jax.jit
def limbs_of(x: jax.Array) -> Limbs:
    return limbs_reference(x, None, 0, None)


@jax.jit
def limbs_of_narrow(x: jax.Array) -> Limbs:
    return limbs_reference(x, None, 0, None, narrow=True)


def wanted(x: Limbs, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The product [M, F] with the numbers that the limbs stand for, and how far off f32 may be.

    A weight is made of a code times a scale, and an offset, which may cancel: each is up to 4 times as large as the
    largest weight of 16 with such codes. Those products are rounded 4 times before they are added: 4 a step of 1024
    elements, or of 256, 8 columns, 4 warps of 2 warpgroups. What is subnormal may be 0, scales of up to 12 times as
    much as well.
    """
    values = integers(x) * np.repeat(np.asarray(x.scale, np.float64), 32, axis=1)
    width = w.shape[1]
    largest, size = np.abs(w).reshape(len(w), -1, 16).max(2), np.abs(values).reshape(len(values), -1, 16).sum(2)
    step = 256 if width < 1024 or width % 256 else 1024
    roundings = 4 + 4 * -(-width // step) + 8 + 8
    noise = roundings * 2.0**-24 * 4 * size @ largest.T
    return values @ w.T, noise + 2.0**-126 * (width + 12 * size.sum(1, keepdims=True))


def check(got: jax.Array, want: np.ndarray, noise: np.ndarray) -> None:
    """A bf16 result is rounded by 2^-8 at most."""
    unit = 2.0**-8 if got.dtype == jnp.bfloat16 else 0.0
    assert (got.shape, np.isfinite(want).all()) == (want.shape, True)
    assert (np.abs(np.asarray(got, np.float64) - want) <= noise + unit * (np.abs(want) + noise)).all()


@partial(jax.jit, static_argnames=("combine", "dtype", "warpgroups", "ctas", "eps", "narrow"))
def interpreted(x, weights, layer, **options):
    return product(x, weights, layer, **{"dtype": jnp.float32} | options, interpret=True)


kernel = partial(mosaic.interpret, interpreted)


def test_there_is_a_kernel_for_every_format():
    assert TILES.keys() == {form.name for form in FORMATS.values()}


# 16 rows of 4 units a step, 64 rows of one where rows are short or end within a unit; each way of loading in both.
WIDE = {"Q4_0": 1280, "Q5_0": 1024, "Q3_K": 1536, "Q4_K": 1792, "Q6_K": 2304, "IQ4_NL": 1024, "IQ4_XS": 1280}
TALL = {"Q4_1": 320, "Q5_1": 704, "Q8_0": 576, "Q2_K": 512, "Q5_K": 768, "MXFP4": 448}


@quick
def test_ctas_that_stay_for_several_tiles():
    """Three and two tiles of the five of two weights, which are of two formats."""
    kinds = {"Q4_K": 48, "Q8_0": 32}
    made, x = [packed(kind, rows, 2048) for kind, rows in kinds.items()], limbs_of(activations(1, 2048))
    for got, (_, values) in zip(kernel(x, [[w] for w, _ in made], LAYER, ctas=2, warpgroups=1), made, strict=True):
        check(got, *wanted(x, values))


@quick
@pytest.mark.parametrize(
    ("kind", "rows", "width", "eps", "warpgroups"),
    [("Q5_1", 64, 640, 1e-5, None), ("Q6_K", 16, 2304, None, 2)],
)
def test_limbs_may_be_made_within(kind, rows, width, eps, warpgroups):
    """The bits of a launch before, and what a launch before makes is right."""
    w, values = packed(kind, rows, width)
    x = activations(2, width)[1:]
    norm = None if eps is None else 1 + jnp.abs(activations(3, width, seed=1)).astype(jnp.float32)
    before = {"norm": norm, "eps": eps}
    (got,) = kernel(x, [[w]], LAYER, warpgroups=warpgroups, **before)
    made = mosaic.interpret(jax.jit(partial(limbs, interpret=True), static_argnums=3), x, norm, LAYER, eps)
    np.testing.assert_array_equal(kernel(made, [[w]], LAYER, warpgroups=warpgroups or 1)[0], got)
    check(got, *wanted(made, values))


@quick
@pytest.mark.parametrize(("kind", "width"), [*WIDE.items(), *TALL.items()])
def test_against_float64(kind, width):
    """Of small integers and powers of 2 every sum is exact, so that not one bit of a code or scale may be wrong."""
    w, values = packed(kind, 16 if kind in WIDE else 64, width)
    x = limbs_of(activations(2, width))
    (got,) = kernel(x, [[w]], LAYER, warpgroups=1)
    check(got, *(want := wanted(x, values)))
    np.testing.assert_array_equal(got[0, ::2], want[0][0, ::2])


def gate(kind: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The activation, and its formula for gate and up; the slopes are below 1.2 and at most 1."""
    if kind == "silu":
        return silu_gate, lambda g: g / (1 + np.exp(-np.maximum(g, -700))), lambda u: u
    if kind == "gelu":
        return gelu_gate, lambda g: g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))), lambda u: u

    def clamped(g: np.ndarray) -> np.ndarray:
        g = np.clip(g, -400, 7)
        return g / (1 + np.exp(-1.702 * g))

    return clamped_gate, clamped, lambda u: np.clip(u, -7, 7) + 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """A launch: sets of weights, each a format and rows; of so many experts, of which each token uses a few."""

    tokens: int
    width: int
    sets: Sequence[Sequence[tuple[str, int]]]
    combine: str | None = None
    residual: bool = False
    dtype: str = "float32"
    warpgroups: int | None = 1
    experts: int = 0
    used: int = 1
    biases: bool = False

    @property
    def options(self) -> dict[str, Any]:
        combine = None if self.combine is None else gate(self.combine)[0]
        return {"combine": combine, "dtype": self.dtype, "warpgroups": self.warpgroups}

    @property
    def chosen(self) -> np.ndarray | None:
        """The expert of each choice: the first has none, the others all of them in turn."""
        n = self.experts
        return (n + np.arange(self.tokens * self.used, dtype=np.int32)) % (n + 1) if n else None

    @property
    def lead(self) -> tuple[int, ...]:
        return (self.experts,) if self.experts else ()

    def operands(self) -> tuple[Limbs, list[list[Packed]], list[list[np.ndarray]]]:
        """Limbs, weights, and the latters' values of LAYER [E * rows, width]."""
        made = [
            [
                packed(kind, max(self.experts, 1) * rows, self.width, seed=10 * i + j)
                for j, (kind, rows) in enumerate(one)
            ]
            for i, one in enumerate(self.sets)
        ]

        def stack(a: jax.Array) -> jax.Array:
            return a.reshape(LAYERS, *self.lead, -1, *a.shape[2:])

        weights = [[jax.tree.map(stack, w) for w, _ in one] for one in made]
        return limbs_of(activations(self.tokens, self.width)), weights, [[v for _, v in one] for one in made]

    def others(self) -> dict[str, Any]:
        rng, rows = np.random.default_rng(9), [[rows for _, rows in one] for one in self.sets]
        found: dict[str, Any] = {"experts": None if self.chosen is None else jnp.asarray(self.chosen)}
        if self.residual:
            found["residual"] = jnp.asarray(rng.standard_normal((self.tokens, rows[0][0])) * 1e3, jnp.bfloat16)
        if self.biases:
            bias = [[rng.standard_normal((LAYERS, *self.lead, n)) for n in one] for one in rows]
            found["biases"] = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), bias)
        return found


def check_case(case: Case, got: Sequence[jax.Array], x: Limbs, values: Sequence[Sequence[np.ndarray]]) -> None:
    assert len(got) == len(values)
    others = case.others()
    none = np.zeros(case.tokens, bool) if case.chosen is None else case.chosen == case.experts

    def one_product(i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each choice, with its bias."""
        want, noise = wanted(x, values[i][j])
        if case.chosen is not None:
            token, expert = np.arange(len(none)) // case.used, np.where(none, 0, case.chosen)
            want, noise = (a.reshape(case.tokens, case.experts, -1)[token, expert] for a in (want, noise))
            if case.biases:
                want = want + np.asarray(others["biases"][i][j], np.float64)[LAYER, expert]
                noise = noise + 2.0**-24 * (np.abs(want) + noise)
        return want, noise

    for i, y in enumerate(got):
        assert y.dtype == case.dtype
        products = [one_product(i, j) for j in range(len(values[i]))]
        want, noise = products[0]
        if case.combine is not None:
            if len(products) == 1:
                products = list(zip(*(np.split(a, 2, axis=1) for a in products[0]), strict=True))
            (g, g_noise), (u, u_noise) = products
            _, act, second = gate(case.combine)
            want = act(g) * second(u)
            noise = 1.2 * g_noise * (np.abs(second(u)) + u_noise) + np.abs(act(g)) * u_noise
            noise += 2.0**-20 * np.abs(want)  # an exp and some products in f32
        if case.residual:
            want = want + np.asarray(others["residual"], np.float64)
            noise = noise + 2.0**-24 * (np.abs(want) + noise)
        assert not np.asarray(y, np.float32)[none].any()
        check(y[~none], want[~none], noise[~none])


GATE_AND_UP = Case(tokens=2, width=1280, sets=[[("Q4_K", 32)] * 2], combine="silu", dtype="bfloat16")
CASES = {
    "5 tokens, short rows, 2 warpgroups, residual": Case(
        tokens=5, width=768, sets=[[("Q5_K", 128)]], warpgroups=2, residual=True
    ),
    "gate and up, 2 formats, 2 warpgroups": Case(
        tokens=1, width=2048, sets=[[("Q6_K", 16), ("Q4_0", 16)]], combine="gelu", warpgroups=None
    ),
    "gate and up of experts": replace(GATE_AND_UP, experts=3, used=2),
    "gate and up in one stack, biases": Case(
        tokens=1, width=320, sets=[[("MXFP4", 128)]], combine="clamped", experts=3, used=4, biases=True
    ),
    "down of experts": Case(tokens=4, width=320, sets=[[("Q8_0", 64)]], experts=3, biases=True),
}


@quick
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_launches_against_float64(case):
    x, weights, values = case.operands()
    check_case(case, kernel(x, weights, LAYER, **case.others(), **case.options), x, values)


@quick
def test_bits_depend_neither_on_other_tokens_nor_on_other_weights():
    """Five tokens are two groups of four, one of them padded; up to sixteen on a GPU, below."""
    case = Case(tokens=5, width=1280, sets=[[("Q4_K", 16)], [("Q6_K", 16)]])
    x, weights, values = case.operands()
    got = kernel(x, weights, LAYER)
    check_case(case, got, x, values)
    np.testing.assert_array_equal(kernel(jax.tree.map(lambda a: a[4:], x), weights[1:], LAYER)[0], got[1][4:])


@quick
@pytest.mark.parametrize(
    ("m", "width", "kind", "rows"), [(5, 1280, "Q6_K", 16), (2, 320, "Q5_1", 64)], ids=["5 tokens", "2"]
)
def test_narrow_tokens_share_products(m, width, kind, rows):
    """In pairs, of which the last may be of one; alone, where the limbs are made within, a token has the same bits."""
    x, (w, values) = activations(m, width), packed(kind, rows, width)
    (got,) = kernel(x, [[w]], LAYER, narrow=True)
    check(got, *wanted(limbs_of_narrow(x), values))
    (alone,) = kernel(x[-1:], [[w]], LAYER, narrow=True)
    np.testing.assert_array_equal(alone, got[-1:])


@quick
@pytest.mark.parametrize(("kind", "rows", "width"), [("Q6_K", 16, 1280), ("Q5_1", 64, 320)])
def test_extreme_activations(kind, rows, width):
    """A nan or infinity is seen in every result of its token, and in no other's."""
    w, values = packed(kind, rows, width)
    w, values = jax.tree.map(lambda a: np.repeat(a[:, ::2], 2, axis=1), w), np.repeat(values[::2], 2, axis=0)
    base = np.random.default_rng(0).standard_normal((4, width)).astype(jnp.bfloat16)
    x = limbs_of(jnp.asarray(base))
    for run in (0, width // 32 - 1):  # in which the first and the last token have something that is no number
        scale, sums = np.array(x.scale), np.array(x.sums)
        scale[::3, run] = sums[::3, 2 * run : 2 * run + 2] = np.nan
        (got,) = kernel(replace(x, scale=jnp.asarray(scale), sums=jnp.asarray(sums)), [[w]], LAYER)
        assert np.isnan(got[::3]).all()
        check(got[1:3], *(part[1:3] for part in wanted(x, values)))
    x = limbs_of(jnp.asarray(base * np.array([[1e30], [1e-30], [0], [1]], jnp.bfloat16)))
    (got,) = kernel(x, [[w]], LAYER)
    check(got, *wanted(x, values))
    assert not got[2].any()
    assert got[1].any()


@quick
def test_a_scale_that_is_no_number_is_seen_in_its_row_alone():
    """Units 0 to 3 are one step, the next takes 1 to 4; each of them in a row of its own, and all of another layer."""
    w, _ = packed("Q6_K", 16, 1280)
    x = limbs_of(activations(4, 1280))  # the program of extreme activations
    (clean,), poisoned, units = kernel(x, [[w]], LAYER), np.array(w.planes["d"]), np.arange(5)
    poisoned[1 - LAYER] = np.nan
    for poison in (np.inf, np.nan):
        poisoned[LAYER, 2 * units + 1, units, 0] = poison
        (got,) = kernel(x, [[replace(w, planes=w.planes | {"d": jnp.asarray(poisoned)})]], LAYER)
        bad = np.isin(np.arange(16), 2 * units + 1)
        assert not np.isfinite(got[:, bad]).any()
        np.testing.assert_array_equal(got[:, ~bad], clean[:, ~bad])


def shapes(kind: str, *shape: int) -> Packed:
    """A stack, without its bytes."""
    form = FORMATS[GGMLQuantizationType[kind]]
    planes = form.split(np.broadcast_to(np.uint8(0), (1, form.size)).copy())
    lead = (LAYERS, *shape[:-1], shape[-1] // form.block)
    return Packed({k: jax.ShapeDtypeStruct((*lead, p.shape[-1]), p.dtype) for k, p in planes.items()}, form)


def test_what_is_beyond_the_kernel():
    for rows, width in ((16, 1024), (48, 1280), (64, 768), (192, 576)):
        assert beyond(shapes("Q8_0", rows, width)) is None
    wide, tall = "by 16 of units of 256, 4 at least", "by 64 of 256 elements at least, by 64"
    for rows, width, least in ((24, 1024, wide), (16, 768, tall), (64, 224, tall), (64, 1056, tall)):
        assert beyond(shapes("Q8_0", rows, width)) == f"{rows} x {width} are not rows {least}"
    assert beyond(shapes("Q8_0", 16, 1024), 2) == "16 x 1024 are not rows by 32 of units of 256, 4 at least"
    assert beyond(jnp.zeros((2, 16, 1024), jnp.bfloat16)) == "bfloat16 is not packed"
    known = shapes("Q4_0", 16, 1024)
    assert beyond(replace(known, format=replace(known.format, name="Q1_0"))) == "Q1_0 is read by no kernel"


def test_what_does_not_fit_is_refused():
    w, _ = packed("Q8_0", 16, 1024)
    x = limbs_of(activations(2, 1024))
    with pytest.raises(NotImplementedError, match="product: 16 x 1024 are not rows by 32"):
        product(x, [[w]], LAYER, combine=silu_gate, dtype=jnp.float32)
    with pytest.raises(ValueError, match="3 choices are no multiple of 2 tokens"):
        product(x, [[w]], LAYER, experts=jnp.zeros(3, jnp.int32), dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"a stack of shape \(2, 16, 1024\) has not 4 axes"):
        product(x, [[w]], LAYER, experts=jnp.zeros(2, jnp.int32), dtype=jnp.float32)


def launches(kinds: Sequence[str], rows: int = 64) -> Iterator[mosaic.Program]:
    """Each format for one token by one warpgroup, and for four, by two where rows are long; and what models launch."""
    cases = {}
    for m in (1, 4):
        for kind in kinds:
            one = Case(tokens=m, width=2304, sets=[[(kind, rows)]], residual=m == 4, dtype="bfloat16")
            short = 768 if kind.endswith(("_K", "IQ4_XS")) else 704
            cases[f"{kind}, {m} tokens"] = replace(one, warpgroups=1 if m == 1 else 2)
            cases[f"{kind}, {m} tokens, short rows"] = replace(one, width=short)
        cases[f"gate and up, {m} tokens"] = replace(GATE_AND_UP, tokens=m)
        qkv = [[("Q4_K", 32)], [("Q6_K", 16)], [("Q8_0", 16)]]
        cases[f"q, k, v, {m} tokens"] = Case(tokens=m, width=1536, sets=qkv, dtype="bfloat16")
        cases[f"gate and up, 2 formats, {m} tokens"] = replace(
            CASES["gate and up, 2 formats, 2 warpgroups"], tokens=m, warpgroups=1
        )
        if m == 1:
            cases |= {name: case for name, case in CASES.items() if case.experts}
    for name, case in cases.items():
        x = jax.eval_shape(lambda case=case: limbs_of(jnp.zeros((case.tokens, case.width), jnp.bfloat16)))
        weights = [[shapes(kind, *case.lead, rows, case.width) for kind, rows in one] for one in case.sets]

        def f(x, weights, layer, others, case=case):
            return product(x, weights, layer, **others, **case.options)

        yield name, f, (x, weights, jax.ShapeDtypeStruct((), jnp.int32), case.others())


def within() -> Iterator[mosaic.Program]:
    """Launches that make limbs themselves: wide rows, two warpgroups, parts of 256 and of 64, experts."""

    def norm(width: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        return jax.ShapeDtypeStruct((1, width), jnp.bfloat16), jax.ShapeDtypeStruct((2, width), jnp.float32)

    for width, kind, rows in ((4096, "Q4_K", 12288), (5376, "Q4_K", 21504), (2560, "Q8_0", 10240), (2880, "MXFP4", 64)):
        x, weight = norm(width)
        w = shapes(kind, rows, width)
        yield (
            f"{rows} x {width} normed",
            lambda x, n, w: product(x, [[w]], 1, norm=n, eps=1e-6, dtype=x.dtype),
            (x, weight, w),
        )
    for width, kind, rows in ((12288, "Q6_K", 4096), (2816, "Q4_K", 64)):
        x, _ = norm(width)
        yield f"{rows} x {width}", lambda x, w: product(x, [[w]], 1, dtype=x.dtype), (x, shapes(kind, rows, width))
    x, weight = norm(2048)
    gate, ids = shapes("Q4_K", 128, 768, 2048), jax.ShapeDtypeStruct((8,), jnp.int32)

    def experts(x, n, w, i):
        return product(x, [[w, w]], 1, norm=n, eps=1e-6, experts=i, combine=silu_gate, dtype=x.dtype)

    yield "experts, normed", experts, (x, weight, gate, ids)
    for m, kind, width in ((2, "Q4_K", 4096), (4, "Q6_K", 12288), (4, "Q5_1", 704)):
        x = jax.ShapeDtypeStruct((m, width), jnp.bfloat16)
        w = shapes(kind, 4096, width)
        yield f"{m} of 8 bits, {kind}", lambda x, w: product(x, [[w]], 1, narrow=True, dtype=x.dtype), (x, w)


def programs(arch: tuple[int, int]) -> Iterator[mosaic.Program]:
    yield from launches(tuple(TILES))
    yield from within()


@pytest.mark.parametrize("kind", TILES)
def test_lowered_for_a_gpu(kind):
    """What is not interpreted: short rows where that has long ones."""
    some = list(launches([kind]))
    some = [*some[4:9:2], *list(within())[3::3]] if kind == "Q4_K" else some[kind in WIDE :][:1]
    for _, f, args in some:
        assert "mosaic_gpu" in mosaic.lower(f, *args, arch=(9, 0))


@mosaic.needs_ptxas
def test_compiled_for_a_gpu_without_spills():
    reports = mosaic.ptxas("test_matvec", (9, 0))
    assert reports.keys() == {name for name, *_ in programs((9, 0))}
    assert not {name: report for name, report in reports.items() if report[1]}


@partial(jax.jit, static_argnames=("combine", "dtype", "narrow"))
def launched(x, weights, layer, **options):
    return product(x, weights, layer, **{"dtype": jnp.float32} | options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "rows", "width"),
    [
        *((kind, 12288, 4096) for kind in TILES),
        *((kind, 4096, 12288) for kind in ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "IQ4_XS", "MXFP4")),
        *((kind, 5376, 21504) for kind in ("Q4_K", "Q6_K", "Q8_0", "Q4_0")),
        ("Q6_K", 151936, 4096),
        ("Q5_K", 1024, 2816),
        *((kind, 2048, 768) for kind in TILES),
        *((kind, 576, 576) for kind in ("Q8_0", "Q4_0", "Q5_0")),
    ],
)
def test_on_a_gpu_at_full_size(kind, rows, width):
    """Every 61st row, of both kinds in turn; and bits of each token alone, whose limbs may be made within."""
    w, values = packed(kind, rows, width, every=61)
    x = activations(16, width)
    (got,) = launched(x, [[w]], LAYER)
    check(got[:, ::61], *(want := wanted(limbs_of(x), values)))
    np.testing.assert_array_equal(got[0, ::122], want[0][0, ::2])
    np.testing.assert_array_equal(launched(x, [[w]], LAYER)[0], got)
    for token in range(16):
        np.testing.assert_array_equal(launched(x[token : token + 1], [[w]], LAYER)[0][0], got[token])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "rows", "width"),
    [*((kind, 4096, 4096) for kind in TILES), ("Q4_K", 12288, 4096), ("Q6_K", 4096, 12288), ("Q5_0", 576, 576)],
)
def test_narrow_on_a_gpu_at_full_size(kind, rows, width):
    """As above, of 8 bits: 16 tokens are 8 pairs, 5 are 3."""
    w, values = packed(kind, rows, width, every=61)
    x = activations(16, width)
    (got,) = launched(x, [[w]], LAYER, narrow=True)
    check(got[:, ::61], *wanted(limbs_of_narrow(x), values))
    for tokens in (slice(5), slice(1, 3), *(slice(t, t + 1) for t in range(16))):
        np.testing.assert_array_equal(launched(x[tokens], [[w]], LAYER, narrow=True)[0], got[tokens])


MODELS = {
    "gate and up": Case(tokens=1, width=4096, sets=[[("Q4_K", 12288)] * 2], combine="silu", dtype="bfloat16"),
    "gate and up, 2 formats": Case(tokens=1, width=5376, sets=[[("Q4_K", 21504), ("Q6_K", 21504)]], combine="gelu"),
    "q, k, v": Case(
        tokens=1, width=4096, sets=[[("Q4_K", 4096)], [("Q4_K", 1024)], [("Q6_K", 1024)]], dtype="bfloat16"
    ),
    "residual": Case(tokens=1, width=12288, sets=[[("Q6_K", 4096)]], residual=True, dtype="bfloat16"),
    "Qwen3-30B-A3B, gate and up": Case(
        tokens=1, width=2048, sets=[[("Q4_K", 768)] * 2], combine="silu", experts=16, used=8, dtype="bfloat16"
    ),
    "Gemma 4 26B-A4B, gate and up in one stack": Case(
        tokens=1, width=2816, sets=[[("Q4_K", 1408)]], combine="gelu", experts=16, used=8, dtype="bfloat16"
    ),
    "gpt-oss, gate and up": Case(
        tokens=1, width=2880, sets=[[("MXFP4", 2880)] * 2], combine="clamped", experts=8, used=4, biases=True
    ),
    "gpt-oss, down": Case(tokens=4, width=2880, sets=[[("MXFP4", 2880)]], experts=8, biases=True),
} | {
    f"down of {width} in {kind}": Case(tokens=8, width=width, sets=[[(kind, rows)]], experts=16)
    for rows, width, kinds in ((2048, 768, ("Q4_K", "Q6_K")), (2816, 704, ("Q5_0", "Q5_1", "Q8_0")))
    for kind in kinds
}


@pytest.mark.gpu
@pytest.mark.parametrize("times", [1, 16])
@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_launches_on_a_gpu_at_full_size(case, times):
    """The bits of a token and its choices alone as well."""
    case = replace(case, tokens=times * case.tokens, warpgroups=None)
    x, weights, values = case.operands()
    run, others = jax.jit(partial(product, **case.options)), case.others()
    got = run(x, weights, LAYER, **others)
    check_case(case, got, x, values)
    jax.tree.map(np.testing.assert_array_equal, run(x, weights, LAYER, **others), got)
    last = {k: v[-case.used :] if k in ("experts", "residual") and v is not None else v for k, v in others.items()}
    alone = run(jax.tree.map(lambda a: a[-1:], x), weights, LAYER, **last)
    jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda y: y[-case.used :], got))
