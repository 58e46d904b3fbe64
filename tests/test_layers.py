"""Each layer against float64 numpy. Single products are exact to f32 rounding, so the bounds are a few of its units."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import Spec, angles, attend, rms_norm, rotate, silu

from jaxinfer import cache, ops
from jaxinfer.layers.attention import AttentionParams, AttentionSpec, attention
from jaxinfer.layers.linear import Linear, linear
from jaxinfer.layers.mlp import MlpParams, mlp, silu_gate
from jaxinfer.layers.norm import rms_norm as jax_rms_norm
from jaxinfer.layers.rope import Rope, Yarn, frequencies, rope, yarn_frequencies, yarn_magnitude

pytestmark = pytest.mark.usefixtures("quick_compiler")

ULP, BF16_ULP = 2.0**-23, 2.0**-7  # distance between numbers at 1
REFERENCE = ops.REFERENCE


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 37), (2, 3, 4, 5, 24)], ids=str)
def test_rms_norm(shape, dtype):
    x = jnp.asarray(normal(*shape) * np.geomspace(1e-6, 1e6, shape[0]).reshape(-1, *[1] * (len(shape) - 1)), dtype)
    x = x.at[..., 0].set(0)
    weight = normal(shape[-1], seed=1)
    got = jax.jit(partial(jax_rms_norm, eps=1e-5))(x, weight)
    assert got.dtype == x.dtype
    want = rms_norm(np.asarray(x, np.float64), weight.astype(np.float64), 1e-5)
    # f32: a mean, a root and two products. bf16: the same, then rounded once to the nearest.
    rtol = 8 * ULP if dtype == "float32" else BF16_ULP / 2 + 8 * ULP
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol)


def test_rms_norm_of_zeros_is_zero():
    assert not np.asarray(jax_rms_norm(jnp.zeros((2, 8)), jnp.ones(8), 1e-6)).any()


def llama3_divisors(width: int, base: float, factor=8.0, low=1.0, high=4.0, original=8192) -> np.ndarray:
    """The divisors that the converter of Llama 3.1 stores."""
    out = []
    for f in base ** (-np.arange(0, width, 2) / width):
        wavelength = 2 * np.pi / f
        blend = (original / wavelength - low) / (high - low)
        out.append(1 if wavelength < original / high else factor if wavelength > original / low else 0)
        out[-1] = out[-1] or 1 / ((1 - blend) / factor + blend)
    return np.array(out, np.float32)


YARN = Yarn(factor=4.0, original_context=4096, attn_factor=1.25)
YARN_KEYS = {"type": "yarn", "factor": 4.0, "original_context_length": 4096, "attn_factor": 1.25}
LLAMA3 = llama3_divisors(64, 500000.0)
FORMS = {
    "plain": (lambda: frequencies(10000.0, 64), Spec(head=64)),
    "partial": (lambda: frequencies(10000.0, 20), Spec(head=64, rotated=20)),
    "linear": (lambda: frequencies(1e6, 64, 2.5), Spec(head=64, base=1e6, scaling={"factor": 2.5})),
    "llama 3": (
        lambda: frequencies(500000.0, 64, divisors=LLAMA3),
        Spec(head=64, base=500000.0, divisors=tuple(LLAMA3.astype(float))),
    ),
    "yarn": (lambda: yarn_frequencies(1e6, 64, YARN), Spec(head=64, base=1e6, scaling=YARN_KEYS)),
    "yarn, partial, divided": (
        lambda: yarn_frequencies(10000.0, 22, YARN, np.arange(1, 12)),
        Spec(head=64, rotated=22, scaling=YARN_KEYS, divisors=tuple(range(1, 12))),
    ),
    "yarn, ramp beyond the last pair": (
        lambda: yarn_frequencies(20.0, 64, dataclasses.replace(YARN, original_context=3000)),
        Spec(head=64, base=20.0, scaling=YARN_KEYS | {"original_context_length": 3000}),
    ),
}


def test_llama3_divisors_have_all_three_bands():
    assert LLAMA3[0] == 1
    assert LLAMA3[-1] == 8
    assert ((LLAMA3 > 1) & (LLAMA3 < 8)).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_rope(form, interleaved):
    make, spec = FORMS[form]
    theta, (want_theta, want_magnitude) = make(), angles(spec)
    magnitude = yarn_magnitude(YARN) if form.startswith("yarn") else 1.0
    np.testing.assert_allclose(theta, want_theta, rtol=1e-14)  # both in float64
    assert magnitude == pytest.approx(want_magnitude, rel=1e-15)
    pos = np.array([[0, 1, 2, 511], [4096, 32768, 99999, 100000]], np.int32)
    x = normal(2, 4, 3, 64)
    turn = jax.jit(partial(rope, spec=Rope(tuple(theta.tolist()), interleaved, magnitude)))
    got = np.asarray(turn(x, pos), np.float64)
    n = 2 * len(theta)
    for row in range(2):
        want = rotate(x[row].astype(np.float64), pos[row], theta, magnitude, interleaved)
        # The angle is rounded twice in f32, as a frequency and as a product, each time by half a unit of its size; the
        # pair is then off by so much of its length, plus the rounding of a sine and three more operations.
        first = want[..., :n:2] if interleaved else want[..., : n // 2]
        second = want[..., 1:n:2] if interleaved else want[..., n // 2 : n]
        bound = np.hypot(first, second) * (pos[row][:, None, None] * theta * ULP + 4 * ULP)
        bound = np.repeat(bound, 2, axis=-1) if interleaved else np.concatenate([bound, bound], axis=-1)
        assert (np.abs(got[row] - want)[..., :n] <= bound).all()
    np.testing.assert_array_equal(got[..., n:], x[..., n:])


def test_rope_takes_keys_and_grouped_queries_alike_and_rounds_bf16_once():
    spec = Rope(tuple(frequencies(10000.0, 16).tolist()), False)
    x = jnp.asarray(normal(1, 5, 2, 3, 16), jnp.bfloat16)
    pos = jnp.arange(5)[None]
    grouped = rope(x, pos, spec)
    np.testing.assert_array_equal(grouped, rope(x.reshape(1, 5, 6, 16), pos, spec).reshape(x.shape))
    np.testing.assert_array_equal(grouped, rope(x.astype(jnp.float32), pos, spec).astype(jnp.bfloat16))


def test_yarn_scales_magnitude_only_above_factor_one():
    assert yarn_magnitude(Yarn(factor=1.0, original_context=64, attn_factor=1.5)) == 1.5
    assert yarn_magnitude(Yarn(factor=0.5, original_context=64, attn_factor=1.5)) == 1.5


def test_linear_adds_its_bias_and_keeps_the_type():
    x, w, b = normal(2, 3, 20), normal(2, 7, 20, seed=1), normal(2, 7, seed=2)
    want = x.astype(np.float64) @ w[1].T.astype(np.float64) + b[1]
    got = linear(Linear(jnp.asarray(w), jnp.asarray(b)), 1, jnp.asarray(x), REFERENCE)
    np.testing.assert_allclose(got, want, atol=40 * ULP)  # 20 products of about 1, summed
    half = linear(Linear(jnp.asarray(w), jnp.asarray(b)), 1, jnp.asarray(x, jnp.bfloat16), REFERENCE)
    assert half.dtype == jnp.bfloat16


def test_swiglu():
    x, gate, up, down = normal(2, 3, 20), *(normal(2, 36, 20, seed=s) for s in (1, 2)), normal(2, 20, 36, seed=3)
    bias = normal(2, 36, seed=4)
    p = MlpParams(Linear(jnp.asarray(gate), jnp.asarray(bias)), Linear(jnp.asarray(up)), Linear(jnp.asarray(down)))
    got = jax.jit(lambda p, x: mlp(p, 1, x, silu_gate, REFERENCE))(p, x)
    wide, g, u, d = (a.astype(np.float64) for a in (x, gate[1], up[1], down[1]))
    want = (silu(wide @ g.T + bias[1]) * (wide @ u.T)) @ d.T
    assert np.abs(got - want).max() <= 20 * ULP * np.abs(want).max()  # sums of 20, 20 and 36 terms


@dataclass(frozen=True, kw_only=True)
class Case:
    heads: int
    kv_heads: int
    norms: bool = False
    biases: bool = False
    window: int | None = None


CASES = {
    "one head": Case(heads=1, kv_heads=1),
    "groups, norms, biases": Case(heads=6, kv_heads=2, norms=True, biases=True),
    "each its own": Case(heads=4, kv_heads=4, biases=True),
    "one for all, window": Case(heads=5, kv_heads=1, norms=True, window=3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_over_two_calls(case):
    """A chunk with padding, then a second one that also attends to the first; only the second layer of a stack."""
    d, width, eps, rng = 20, 10, 1e-5, np.random.default_rng(0)
    theta = frequencies(100.0, width)

    def weight(rows: int, columns: int) -> Linear:
        bias = jnp.asarray(rng.standard_normal((2, rows), np.float32)) if case.biases else None
        return Linear(jnp.asarray(rng.standard_normal((2, rows, columns), np.float32) / np.float32(columns**0.5)), bias)

    def norm() -> Any:
        return jnp.asarray(rng.uniform(0.5, 1.5, (2, width)), jnp.float32) if case.norms else None

    n, k = case.heads * width, case.kv_heads * width
    p = AttentionParams(weight(n, d), weight(k, d), weight(k, d), weight(d, n), q_norm=norm(), k_norm=norm())
    spec = AttentionSpec(
        kv_heads=case.kv_heads,
        group=case.heads // case.kv_heads,
        width=width,
        scale=0.3,
        rope=Rope(tuple(theta.tolist()), interleaved=True),
        eps=eps,
        window=case.window,
    )
    assert spec.heads == case.heads
    x, pos = normal(1, 12, d, seed=5), np.array([-1, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9], np.int32)
    held = cache.empty(2, 1, case.kv_heads, 16, width, jnp.float32)
    layer = jax.jit(lambda p, x, pos, held: attention(p, 1, x, pos, held, spec, REFERENCE))
    got = []
    for start in (0, 6):
        y, held = layer(p, x[:, start : start + 6], pos[None, start : start + 6], held)
        got.append(y[0])
    assert (np.asarray(held.pos[0]) == -1).all()  # the first layer's part is untouched

    def project(linear: Any, x: np.ndarray) -> np.ndarray:
        bias = 0 if linear.bias is None else np.asarray(linear.bias[1], np.float64)
        return x @ np.asarray(linear.weight[1], np.float64).T + bias

    def normed(x: np.ndarray, weight: Any) -> np.ndarray:
        return x if weight is None else rms_norm(x, np.asarray(weight[1], np.float64), eps)

    real, pos = x[0, 2:].astype(np.float64), pos[2:]
    q, k, v = (project(linear, real).reshape(10, -1, width) for linear in (p.q, p.k, p.v))
    q, k = (rotate(a, pos, theta, 1.0, True) for a in (normed(q, p.q_norm), normed(k, p.k_norm)))
    age = pos[:, None] - pos
    want = project(p.o, attend(q, k, v, (age >= 0) & (age < (case.window or 99)), 0.3).reshape(10, -1))
    # f32 sums of 20, 10, 10 and up to 60 terms, none of them near cancelling as a whole
    assert np.abs(np.concatenate(got)[2:] - want).max() <= 20 * ULP * np.abs(want).max()
