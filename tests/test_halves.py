"""Products of few tokens with weights of 16 bits, against float64: interpreted, lowered and compiled, and on a GPU."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from models import rms_norm
from test_matvec import gate

from jaxinfer.layers.mlp import silu_gate
from jaxinfer.pallas.halves import beyond, normed, product
from jaxinfer.quants import FORMATS, Packed

LAYERS, LAYER, EPS = 2, 1, 1e-3
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}  # relative error of rounding, at most
quick = pytest.mark.usefixtures("quick_compiler")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A launch: the rows of each weight of each set; of so many experts, of which each token uses a few."""

    tokens: int
    width: int
    sets: Sequence[Sequence[int]]
    type: str = "bfloat16"
    weights: str = "bfloat16"
    norm: bool = False
    combine: str | None = None
    residual: bool = False
    dtype: str = "float32"
    experts: int = 0
    used: int = 1
    biases: bool = False

    @property
    def options(self) -> dict[str, Any]:
        combine = None if self.combine is None else gate(self.combine)[0]
        return {"combine": combine, "dtype": self.dtype, "eps": EPS if self.norm else None}

    @property
    def chosen(self) -> np.ndarray | None:
        """The expert of each choice: the first has none, the others all of them in turn."""
        n = self.experts
        return (n + np.arange(self.tokens * self.used, dtype=np.int32)) % (n + 1) if n else None

    def stack(self, rows: int, seed: int) -> jax.Array:
        """Weights about 1 in size; even rows have small integers, and the other layer nothing that is a number."""
        rng, lead = np.random.default_rng(seed), (self.experts,) * (self.experts > 0)
        w = rng.standard_normal((*lead, rows, self.width), np.float32)
        w[..., ::2, :] = rng.integers(-2, 3, w[..., ::2, :].shape)
        out = np.full((LAYERS, *w.shape), np.nan, jnp.dtype(self.weights))
        out[LAYER] = w
        return jnp.asarray(out)

    def operands(self) -> "Operands":
        """x, of which the first token has small integers, the weights, and what else there is."""
        rng, lead = np.random.default_rng(9), (self.experts,) * (self.experts > 0)
        x = rng.standard_normal((self.tokens, self.width)) * 2.0 ** rng.integers(-5, 5, (self.tokens, self.width))
        x[0] = rng.integers(-3, 4, self.width)
        found: dict[str, Any] = {"experts": None if self.chosen is None else jnp.asarray(self.chosen)}
        if self.norm:
            found["norm"] = jnp.asarray(1 + rng.standard_normal((LAYERS, self.width)) / 4, jnp.float32)
        if self.residual:
            found["residual"] = jnp.asarray(rng.standard_normal((self.tokens, self.sets[0][0])) * 1e3, self.type)
        if self.biases:
            biases = [[rng.standard_normal((LAYERS, *lead, n)) for n in one] for one in self.sets]
            found["biases"] = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), biases)
        weights = [[self.stack(n, 10 * i + j) for j, n in enumerate(one)] for i, one in enumerate(self.sets)]
        return jnp.asarray(x, self.type), weights, found


type Operands = tuple[jax.Array, list[list[jax.Array]], dict[str, Any]]


def check(case: Case, operands: Operands, got: Sequence[jax.Array], every: int = 1) -> None:
    """Every so many rows of the results of a case.

    Operands are of the activations' type, and their products exact. A warp adds up a quarter of them, 16 at a time: the
    tensor cores lose less than 2^-22 of the largest partial sum each time. A norm is rounded to x's type.
    """
    x, weights, others = operands
    values = np.asarray(x, np.float64)
    if case.norm:
        values = rms_norm(values, np.asarray(others["norm"][LAYER], np.float64), EPS)
    none = np.zeros(case.tokens, bool) if case.chosen is None else case.chosen == case.experts
    lost = (case.width / 64 + 8) * 2.0**-22 + (UNIT[case.type] if case.norm else 0)
    assert len(got) == len(weights)

    def one_product(i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each choice, with its bias, and how far off it may be."""
        w = np.asarray(weights[i][j][LAYER][..., ::every, :].astype(case.type), np.float64)
        if case.chosen is None:
            return values @ w.T, lost * (np.abs(values) @ np.abs(w).T)
        w, v = w[np.where(none, 0, case.chosen)], np.repeat(values, case.used, axis=0)
        want, noise = np.einsum("cfd,cd->cf", w, v), lost * np.einsum("cfd,cd->cf", np.abs(w), np.abs(v))
        if case.biases:
            want = want + np.asarray(others["biases"][i][j], np.float64)[LAYER, np.where(none, 0, case.chosen)]
        return want, noise + 2.0**-24 * (np.abs(want) + noise)

    for i, y in enumerate(got):
        assert y.dtype == case.dtype
        products = [one_product(i, j) for j in range(len(weights[i]))]
        want, noise = products[0]
        if case.combine is not None:
            if len(products) == 1:
                products = list(zip(*(np.split(a, 2, axis=1) for a in products[0]), strict=True))
            (g, g_noise), (u, u_noise) = products
            _, act, second = gate(case.combine)
            want = act(g) * second(u)
            noise = 1.2 * g_noise * (np.abs(second(u)) + u_noise) + np.abs(act(g)) * u_noise
            noise += 2.0**-20 * np.abs(want)  # an exp and some products in f32
        elif not (case.norm or case.biases or case.residual):
            noise[0, ::2] = 0  # small integers
        if case.residual:
            before = np.asarray(others["residual"], np.float64)[:, ::every]
            want, noise = want + before, noise + 2.0**-24 * (np.abs(want + before) + noise)
        noise += UNIT[case.dtype] * (np.abs(want) + noise) if case.dtype != "float32" else 0
        y = np.asarray(y[:, ::every], np.float64)
        assert y.shape == want.shape
        assert not y[none].any()
        assert (np.abs(y - want) <= noise)[~none].all()


@partial(jax.jit, static_argnames=("combine", "dtype", "eps"))
def interpreted(x, weights, layer, **options):
    return product(x, weights, layer, **options, interpret=True)


def kernel(case: Case, x: jax.Array, weights: list[list[jax.Array]], others: dict[str, Any]) -> tuple[jax.Array, ...]:
    return mosaic.interpret(interpreted, x, weights, LAYER, **others, **case.options)


EXPERTS = Case(tokens=2, width=512, sets=[[16] * 2], combine="silu", norm=True, experts=3, used=2, dtype="bfloat16")
CASES = {
    "16 tokens, pairs of tiles": Case(tokens=16, width=1024, sets=[[64]], dtype="bfloat16"),
    "3 tokens, the last step in part, f16": Case(
        tokens=3, width=448, sets=[[32], [16]], norm=True, type="float16", weights="float16", dtype="float16"
    ),
    "q, k, v": Case(tokens=1, width=576, sets=[[32], [16], [16]], norm=True, dtype="bfloat16"),
    "9 tokens, gate and up, residual, f16 to be rounded": Case(
        tokens=9, width=256, sets=[[16, 16]], weights="float16", combine="gelu", residual=True
    ),
    "gate and up of experts": EXPERTS,
    "gate and up in one stack, biases": Case(
        tokens=1, width=320, sets=[[64]], combine="clamped", experts=3, used=4, biases=True
    ),
    "down of experts": Case(tokens=4, width=256, sets=[[16]], experts=3, biases=True),
}


@quick
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case):
    """Of small integers every sum is exact, so that not one element may be wrong."""
    operands = case.operands()
    check(case, operands, kernel(case, *operands))


@quick
def test_bits_do_not_depend_on_other_tokens():
    """Those of a token alone, normed by its CTA; of ten by a launch before, two tiles at a time."""
    case = Case(tokens=10, width=576, sets=[[32]], norm=True)
    x, weights, others = case.operands()
    got = kernel(case, x, weights, others)
    check(case, (x, weights, others), got)
    for token in (0, 9):
        np.testing.assert_array_equal(kernel(case, x[token : token + 1], weights, others)[0][0], got[0][token])


@quick
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norm(dtype):
    """A product in f32 or two, which shift a rounding at most where the number is almost between two others."""
    case = Case(tokens=2, width=320, sets=[], norm=True, type=dtype)
    x, _, others = case.operands()
    got = mosaic.interpret(partial(normed, interpret=True), x, others["norm"], LAYER, EPS)
    want = rms_norm(np.asarray(x, np.float64), np.asarray(others["norm"][LAYER], np.float64), EPS)
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=UNIT[dtype] + 2.0**-20, atol=2.0**-25)


@quick
def test_what_is_no_number_is_seen_in_its_token_and_in_its_row_alone():
    """In the columns that the last two steps share, and in the first ones."""
    case = Case(tokens=3, width=320, sets=[[16]])
    x, ((w,),), others = case.operands()
    (clean,) = kernel(case, x, [[w]], others)
    bad = x.at[0, 100].set(jnp.inf).at[2, 0].set(jnp.nan)
    (got,) = kernel(case, bad, [[w.at[LAYER, 3, 100].set(jnp.nan).at[LAYER, 4, 319].set(jnp.inf)]], others)
    seen = ~np.isfinite(np.asarray(got))
    assert seen[2].all()
    assert seen[:, 3:5].all()
    assert seen[0].any()
    rest = np.delete(np.arange(16), [3, 4])
    np.testing.assert_array_equal(got[1, rest], clean[1, rest])


def test_what_is_beyond_the_kernel():
    def stack(rows: int, width: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((LAYERS, rows, width), dtype)

    for rows, width in ((16, 256), (48, 2880), (160, 704)):
        assert beyond([stack(rows, width)] * 2) is None
    for rows, width in ((24, 1024), (16, 224), (16, 1056)):
        assert beyond([stack(rows, width)]) == f"{rows} x {width} are not rows by 16 of 256 elements at least, by 64"
    assert beyond([stack(48, 1024)], 2) == "48 x 1024 are not rows by 32 of 256 elements at least, by 64"
    assert beyond([stack(16, 256), stack(16, 256, jnp.float32)]) == "float32 is not bfloat16 or float16"
    form = next(iter(FORMATS.values()))
    assert beyond([stack(16, 256), stack(16, 256, jnp.float16)]) == "weights of bfloat16 and of float16"
    assert beyond([Packed({}, form)]) == f"{form.name} is not bfloat16 or float16"


def test_what_does_not_fit_is_refused():
    w, x = jnp.zeros((LAYERS, 16, 256), jnp.bfloat16), jnp.zeros((2, 256), jnp.bfloat16)
    run = partial(product, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="product: 16 x 256 are not rows by 32"):
        run(x, [[w]], LAYER, combine=silu_gate)
    with pytest.raises(NotImplementedError, match="product: activations of float32"):
        run(x.astype(jnp.float32), [[w]], LAYER)
    with pytest.raises(NotImplementedError, match="product: weights of bfloat16 and of float16"):
        run(x, [[w], [w.astype(jnp.float16)]], LAYER)
    with pytest.raises(NotImplementedError, match="product: 17 tokens are more than 16"):
        run(jnp.zeros((17, 256), jnp.bfloat16), [[w]], LAYER)
    with pytest.raises(ValueError, match="3 choices are no multiple of 2 tokens"):
        run(x, [[w]], LAYER, experts=jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match=r"a stack of shape \(2, 16, 256\) has not 4 axes"):
        run(x, [[w]], LAYER, experts=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match="has not 3 axes and rows of 512"):
        run(jnp.zeros((2, 512), jnp.bfloat16), [[w]], LAYER)
    with pytest.raises(ValueError, match="a norm needs its eps"):
        run(x, [[w]], LAYER, norm=jnp.ones((LAYERS, 256)))


QKV = Case(tokens=1, width=4096, sets=[[4096], [1024], [1024]], norm=True, dtype="bfloat16")
GATE_AND_UP = Case(tokens=1, width=4096, sets=[[12288] * 2], norm=True, combine="silu", dtype="bfloat16")
DOWN = Case(tokens=1, width=12288, sets=[[4096]], residual=True, dtype="bfloat16")
MODELS = {
    "q, k, v": QKV,
    "q, k, v, 3 tokens": replace(QKV, tokens=3),
    "q, k, v, 16 tokens": replace(QKV, tokens=16),
    "gate and up": GATE_AND_UP,
    "gate and up, 16 tokens": replace(GATE_AND_UP, tokens=16),
    "down": DOWN,
    "down, 3 tokens": replace(DOWN, tokens=3),
    "down, 16 tokens": replace(DOWN, tokens=16),
    "down, 16 tokens, f16 to be rounded": replace(DOWN, tokens=16, weights="float16"),
    "the head": Case(tokens=1, width=4096, sets=[[151936]]),
    "the head, 16 tokens": Case(tokens=16, width=4096, sets=[[151936]]),
    "gate and up of experts": replace(EXPERTS, tokens=1, width=2048, sets=[[768] * 2], experts=128, used=8),
    "gate and up of experts, 16 tokens": replace(EXPERTS, tokens=16, width=2048, sets=[[768] * 2], experts=128, used=8),
    "down of experts": Case(tokens=8, width=768, sets=[[2048]], experts=128),
    "gpt-oss, gate and up in one stack": Case(
        tokens=1, width=2880, sets=[[5760]], combine="clamped", norm=True, experts=8, used=4, biases=True
    ),
}


def programs(arch: tuple[int, int]) -> Iterator[mosaic.Program]:
    """Of small cases; and of MODELS, without their bytes."""
    for name, case in (CASES | MODELS).items() if arch == (9, 0) else ():
        lead = (LAYERS, *(case.experts,) * (case.experts > 0))

        def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, dtype)

        weights = [[shape(*lead, n, case.width, dtype=case.weights) for n in one] for one in case.sets]
        others = {
            "norm": shape(LAYERS, case.width) if case.norm else None,
            "experts": shape(case.tokens * case.used, dtype=jnp.int32) if case.experts else None,
            "biases": [[shape(*lead, n) for n in one] for one in case.sets] if case.biases else None,
            "residual": shape(case.tokens, case.sets[0][0], dtype=case.type) if case.residual else None,
        }

        def f(x, weights, layer, others, case=case):
            return product(x, weights, layer, **others, **case.options)

        yield name, f, (shape(case.tokens, case.width, dtype=case.type), weights, shape(dtype=jnp.int32), others)


@pytest.mark.parametrize("name", ["q, k, v", "gate and up, 16 tokens", "down, 3 tokens", "gate and up of experts"])
def test_lowered_for_a_gpu(name):
    (f, args), *_ = (found for other, *found in programs((9, 0)) if other == name)
    assert "mosaic_gpu" in mosaic.lower(f, *args, arch=(9, 0))


@mosaic.needs_ptxas
def test_compiled_for_a_gpu_without_spills():
    """Three CTAs of 128 threads on a multiprocessor leave 168 registers to each thread."""
    reports = mosaic.ptxas("test_halves", (9, 0))
    assert reports.keys() == {name for name, *_ in programs((9, 0))}
    assert not {name: report for name, report in reports.items() if report[1] or report[0] > 168}


@pytest.mark.gpu
@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_on_a_gpu_at_full_size(case):
    """Every 61st row, of both kinds in turn; and the bits of a token, and its choices, alone and once more."""
    x, weights, others = case.operands()
    run = jax.jit(partial(product, **case.options))
    got = run(x, weights, LAYER, **others)
    check(case, (x, weights, others), got, every=1 if case.biases else 61)
    jax.tree.map(np.testing.assert_array_equal, run(x, weights, LAYER, **others), got)
    last = {k: v[-case.used :] if k in ("experts", "residual") and v is not None else v for k, v in others.items()}
    alone = run(x[-1:], weights, LAYER, **last)
    jax.tree.map(np.testing.assert_array_equal, alone, jax.tree.map(lambda y: y[-case.used :], got))
