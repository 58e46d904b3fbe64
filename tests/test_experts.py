"""Routed experts by kernels that are interpreted, against float64, and what is left to XLA."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from models import random_blocks

from jaxinfer.layers.mlp import clamped_gate, silu_gate
from jaxinfer.ops import experts as ops
from jaxinfer.ops.experts import ExpertParams, experts_hopper
from jaxinfer.quants import FORMATS, Packed, Weight

LAYERS, LAYER, EXPERTS, USED, WIDTH, FFN = 2, 1, 5, 2, 256, 256
FIELDS = "gate", "up", "down"
pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op's kernels run on a CPU."""
    for module, name in ((ops, "reduce"), (ops.matvec, "product"), (ops.halves, "product")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=True))
    # Each warpgroup is a thread of the interpreter's, and there are few.
    monkeypatch.setattr(ops.grouped, "grouped", partial(ops.grouped.grouped, interpret=True, ctas=2))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), jnp.bfloat16)


def stack(kind: str, rows: int, width: int, seed: int) -> tuple[Weight, np.ndarray]:
    """Experts of some layers, and those of the one that is used in float64."""
    if kind == "BF16":
        w = normal(LAYERS, EXPERTS, rows, width, seed=seed) * jnp.bfloat16(2.0**-4)
        return w, np.asarray(w[LAYER], np.float64)
    form = FORMATS[GGMLQuantizationType[kind]]
    raw = random_blocks(GGMLQuantizationType[kind], (LAYERS, EXPERTS, rows, width), std=width**-0.5, seed=seed)
    planes = form.split(raw.reshape(LAYERS, EXPERTS, rows, -1, form.size))
    values = dequantize(raw[LAYER], GGMLQuantizationType[kind]).astype(np.float64)
    return Packed({name: jnp.asarray(plane) for name, plane in planes.items()}, form), values


def made(kinds: tuple[str, str, str], biased: bool = False) -> tuple[ExpertParams, dict[str, np.ndarray]]:
    """Networks with scales, gate and up in one where up has no type, and their layer's weights in float64."""
    shapes = (FFN if kinds[1] else 2 * FFN, WIDTH), (FFN, WIDTH), (WIDTH, FFN)
    pairs = {n: stack(k, *s, i) for i, (n, k, s) in enumerate(zip(FIELDS, kinds, shapes, strict=True)) if k}
    if not kinds[1]:
        gate, up = np.split(pairs["gate"][1], 2, axis=1)
        pairs = pairs | {"gate": (pairs["gate"][0], gate), "up": (None, up)}
    scale = np.linspace(0.5, 1.5, LAYERS * EXPERTS, dtype=np.float32).reshape(LAYERS, EXPERTS)
    rng = np.random.default_rng(9)
    biases = {n: rng.standard_normal((LAYERS, EXPERTS, WIDTH), np.float32) * biased for n in FIELDS}
    given = {f"{n}_bias": jnp.asarray(b) for n, b in biases.items()} if biased else {}
    p = ExpertParams(**{n: w for n, (w, _) in pairs.items()}, **given, scale=jnp.asarray(scale))
    values = {n: v for n, (_, v) in pairs.items()} | {"scale": scale[LAYER].astype(np.float64)}
    return p, values | {f"{n}_bias": b[LAYER].astype(np.float64) for n, b in biases.items()}


def call(m: int, p: ExpertParams, **options):
    """The op on m tokens of which the second is padding: (operands, result).

    It is no jitted program: beside others' callbacks XLA's threads may be too few for those of an interpreted kernel.
    """
    rng = np.random.default_rng(m)
    chosen = rng.random((m, EXPERTS)).argsort(-1)[:, :USED].astype(np.int32)
    given = normal(m, WIDTH, seed=m), jnp.asarray(chosen), jnp.asarray(rng.random((m, USED), np.float32))
    valid = jnp.arange(m) != 1
    run = partial(experts_hopper, activation=silu_gate, dtype=jnp.float32)
    return (*given, valid), run(p, LAYER, *given, valid, **options)


@pytest.mark.parametrize(("m", "kinds", "biased"), [
    (3, ("Q4_K", "Q4_K", "Q8_0"), True),
    (17, ("BF16", "", "Q8_0"), False),
])  # fmt: skip
def test_experts_against_float64(m, kinds, biased):
    p, w = made(kinds, biased)
    shared, residual, gate = normal(m, WIDTH, seed=7), normal(m, WIDTH, seed=8), jnp.linspace(-2, 2, m)
    (x, chosen, weights, valid), got = call(m, p, shared=shared, residual=residual, gate=gate)
    want, size = np.zeros((m, WIDTH)), np.zeros((m, WIDTH))
    rows, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    for i in np.flatnonzero(valid):
        for e, weight in zip(np.asarray(chosen)[i], weights[i], strict=True):
            g, u = (w[n][e] @ rows[i] + w[f"{n}_bias"][e] for n in ("gate", "up"))
            h = g / (1 + np.exp(-g)) * u
            bias = w["down_bias"][e]
            want[i] += weight * w["scale"][e] * (w["down"][e] @ h + bias)
            size[i] += weight * w["scale"][e] * np.sqrt((w["down"][e] ** 2) @ (h**2) + bias**2)
    added = np.asarray(shared, np.float64) / (1 + np.exp(-np.asarray(gate, np.float64)))[:, None]
    want += added + np.asarray(residual, np.float64)
    # Decoded weights, hidden values and outputs of choices are rounded to bf16, each by 2^-8 at most, independently:
    # 6 * 2^-8 of the root of the sum of squares are 5 standard deviations. The rest is f32.
    assert (np.abs(np.asarray(got) - want) < 6 * 2.0**-8 * size + 1e-5).all()
    assert np.abs(np.asarray(got)[1] - (added + np.asarray(residual, np.float64))[1]).max() < 1e-5, "padding"


def test_activations_of_8_bits():
    """Inputs and hidden values err by a unit of 2^-6 of their run's exponent over the root of 12; less would be more
    bits. The error of a sum of products is the root of the sum of squares; gate and up have slopes of 1.2 at most."""

    def error(y: np.ndarray) -> np.ndarray:
        largest = np.abs(y).reshape(-1, 32).max(1)
        return np.repeat(2.0 ** (np.floor(np.log2(largest)) - 6) / np.sqrt(12), 32)

    p, w = made(("Q4_K", "Q4_K", "Q8_0"))
    (x, chosen, weights, _), got = call(3, p, narrow=True)
    row, want, noise = np.asarray(x[2], np.float64), np.zeros(WIDTH), np.zeros(WIDTH)
    for e, given in zip(np.asarray(chosen)[2], np.asarray(weights, np.float64)[2], strict=True):
        weight = given * w["scale"][e]
        (g, g_error), (u, u_error) = ((w[n][e] @ row, np.sqrt(w[n][e] ** 2 @ error(row) ** 2)) for n in ("gate", "up"))
        h = g / (1 + np.exp(-g)) * u
        of_h = np.hypot(error(h), np.hypot(1.2 * g_error * u, u_error * g))
        want += weight * (w["down"][e] @ h)
        noise += weight**2 * (w["down"][e] ** 2 @ of_h**2)
    wrong = np.abs(np.asarray(got, np.float64)[2] - want) / np.sqrt(noise)
    assert wrong.max() < 6
    assert wrong.mean() > 1 / 4


def test_which_kernels_run_and_why_not():
    packed, _ = made(("Q4_K", "Q4_K", "Q4_K"))
    biased, _ = made(("Q4_K", "Q4_K", "Q4_K"), biased=True)
    plain, _ = made(("BF16", "BF16", "BF16"))
    narrow = jax.tree.map(lambda a: a[..., :60, :], plain.down)
    cases = [
        (packed, 3, "[few rows, choice by choice]"),
        (packed, 20, "[grouped products]"),
        (biased, 3, "[few rows, choice by choice]"),
        (biased, 20, "[grouped products]"),
        (plain, 3, "[few rows, choice by choice]"),
        (plain, 20, "[grouped products]"),
        (dataclasses.replace(plain, down=narrow), 20, "[by XLA; 60 columns are no multiple of 64]"),
    ]
    for p, m, form in cases:
        x, chosen = jnp.zeros((m, WIDTH), jnp.bfloat16), jnp.zeros((m, USED), jnp.int32)
        run = partial(experts_hopper, activation=clamped_gate, dtype=jnp.float32)
        text = jax.make_jaxpr(run)(p, LAYER, x, chosen, jnp.ones((m, USED)), jnp.ones(m, bool))
        assert form in text.pretty_print(name_stack=True), form
    run = partial(run, narrow=True)
    text = jax.make_jaxpr(run)(packed, LAYER, x, chosen, jnp.ones((m, USED)), jnp.ones(m, bool))
    assert "[grouped products of 8 bits]" in text.pretty_print(name_stack=True)
