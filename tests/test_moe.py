"""Mixtures of experts against float64, token by token and expert by expert; bit for bit where arithmetic is exact."""

import dataclasses
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from jax import lax
from models import random_blocks

from jaxinfer.gguf import Tensor
from jaxinfer.layers import routing
from jaxinfer.layers.linear import Linear
from jaxinfer.layers.mlp import MlpParams, clamped_gate, gelu_gate, mlp, silu_gate
from jaxinfer.layers.moe import MoeParams, MoeSpec, moe
from jaxinfer.ops import REFERENCE
from jaxinfer.ops.experts import ExpertParams, experts_gpu, experts_reference, group, tile_of, tiles
from jaxinfer.ops.matmul import FEW
from jaxinfer.quants import FORMATS, Packed, pack

pytestmark = pytest.mark.usefixtures("quick_compiler")

ULP, BF16_ULP = 2.0**-23, 2.0**-7  # distance between numbers at 1
WAYS = {  # for few rows, and for many, which both operations treat alike
    "one by one": (experts_reference, 6),
    "all at once": (experts_gpu, 6),
    "grouped": (experts_reference, 24),
}
every_way = pytest.mark.parametrize(("experts", "m"), WAYS.values(), ids=WAYS)
every_experts = pytest.mark.parametrize("experts", [experts_reference, experts_gpu], ids=["reference", "gpu"])
FIELDS = "gate", "up", "down", "gate_bias", "up_bias", "down_bias", "scale"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def choices(m: int, used: int, experts: int, seed: int = 0) -> np.ndarray:
    """Distinct experts for each of m rows."""
    return np.random.default_rng(seed).random((m, experts)).argsort(-1)[:, :used].astype(np.int32)


def params(**fields: np.ndarray) -> ExpertParams:
    return jax.tree.map(jnp.asarray, ExpertParams(**{"up": None} | fields))


@partial(jax.jit, static_argnames=("experts", "activation"))
def run(experts, p: ExpertParams, layer, x, chosen, weights, valid=None, activation=silu_gate):
    valid = jnp.ones(len(x), bool) if valid is None else valid
    return experts(p, layer, x, chosen, weights, valid, activation=activation, dtype=jnp.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu64(g, u):
    return g * sigmoid(g) * u


def gelu64(g, u):
    return 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u


def clamped64(g, u):
    g, u = np.minimum(g, 7), np.clip(u, -7, 7)
    return g * sigmoid(1.702 * g) * (u + 1)


ACTIVATIONS = {"silu": (silu_gate, silu64), "gelu": (gelu_gate, gelu64), "clamped": (clamped_gate, clamped64)}
every_activation = pytest.mark.parametrize(("activation", "wide"), ACTIVATIONS.values(), ids=ACTIVATIONS)


def expert64(w: dict[str, np.ndarray], e: int, x: np.ndarray, activation=silu64) -> np.ndarray:
    """Expert e on one row; w holds float64 arrays [E, ...] by the names of ExpertParams."""

    def part(name: str, default: float) -> Any:
        return w[name][e] if name in w else default

    gate = w["gate"][e] @ x + part("gate_bias", 0)
    gate, up = (gate, w["up"][e] @ x + part("up_bias", 0)) if "up" in w else np.split(gate, 2)
    return part("scale", 1) * (w["down"][e] @ activation(gate, up) + part("down_bias", 0))


def experts64(w, x, chosen, weights, activation=silu64) -> np.ndarray:
    return np.stack(
        [
            sum(a * expert64(w, e, np.float64(row), activation) for e, a in zip(picks, by, strict=True))
            for row, picks, by in zip(x, chosen, np.float64(weights), strict=True)
        ]
    )


def stack(kind: GGMLQuantizationType, *shape: int, seed: int):
    """A weight [R, E, out, in] as it is on the device, and its float64 values by gguf-py."""
    if kind in FORMATS:
        raw = random_blocks(kind, shape, std=shape[-1] ** -0.5, seed=seed)
    else:
        raw = quantize(normal(*shape, seed=seed) * np.float32(shape[-1] ** -0.5), kind)
    data = np.ascontiguousarray(raw).view(np.uint8).reshape(*shape[:-1], -1)
    packed = pack([Tensor(f"blk.{i}", kind, shape[1:], row) for i, row in enumerate(data)])
    return jax.tree.map(jnp.asarray, packed), np.float64(dequantize(raw, kind)).reshape(shape)


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0", "MXFP4", "Q4_K"])
def test_every_type_of_weight_in_a_loop_over_layers(kind):
    repeats, e, d, f, used = 2, 5, 256, 256, 2
    shapes = {"gate": (f, d), "up": (f, d), "down": (d, f)}
    both = {
        name: stack(GGMLQuantizationType[kind], repeats, e, *shape, seed=seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    p = ExpertParams(**{name: w for name, (w, _) in both.items()})
    cases = [(op, (normal(m, d, seed=m), choices(m, used, e), normal(m, used, seed=9))) for op, m in WAYS.values()]

    @jax.jit
    def all_layers(p):
        def body(i, out):
            return [y.at[i].set(run(experts, p, i, *case)) for y, (experts, case) in zip(out, cases, strict=True)]

        return lax.fori_loop(0, repeats, body, [jnp.zeros((repeats, *x.shape)) for _, (x, *_) in cases])

    for got, (_, case) in zip(all_layers(p), cases, strict=True):
        for i in range(repeats):
            want = experts64({name: values[i] for name, (_, values) in both.items()}, *case)
            # f32 sums of 256 terms, thrice: errors of some roots of 256 half units each
            assert np.abs(got[i] - want).max() <= 32 * ULP * np.abs(want).max()


@every_way
@pytest.mark.parametrize(("name", "fused"), [("silu", False), ("gelu", True), ("clamped", False)])
def test_biases_scales_and_activations(experts, m, name, fused):
    activation, wide = ACTIVATIONS[name]
    e, d, f, used = 6, 12, 20, 3
    shapes = (e, f, d), (e, f, d), (e, d, f), (e, f), (e, f), (e, d), (e,)
    w = {field: 2 * normal(1, *shape, seed=s) for s, (field, shape) in enumerate(zip(FIELDS, shapes, strict=True))}
    if fused:
        w |= {"gate": np.concatenate([w["gate"], w.pop("up")], 2)}
        w |= {"gate_bias": np.concatenate([w["gate_bias"], w.pop("up_bias")], 2)}
    x, chosen, weights = normal(m, d), choices(m, used, e), normal(m, used, seed=8)
    got = run(experts, params(**w), 0, x, chosen, weights, activation=activation)
    want = experts64({field: np.float64(a[0]) for field, a in w.items()}, x, chosen, weights, wide)
    assert np.abs(got - want).max() <= 32 * ULP * np.abs(want).max()  # sums of 12, 20 and 3 terms


@every_activation
def test_activations(activation, wide):
    g, u = np.float32([[-100, -8, -7, -1, 0, 1e-3, 1, 6.9, 7, 7.1, 100]] * 2), np.float32([[-9.0], [8.0]])
    g, u = np.broadcast_arrays(g, u)
    np.testing.assert_allclose(activation(jnp.asarray(g), jnp.asarray(u)), wide(np.float64(g), u), rtol=1e-5, atol=1e-6)
    g, u = jnp.asarray(g, jnp.bfloat16), jnp.asarray(u, jnp.bfloat16)
    half = activation(g, u)
    assert half.dtype == jnp.bfloat16  # computed in f32, rounded once
    np.testing.assert_allclose(half, wide(np.float64(g), np.float64(u)), rtol=BF16_ULP / 2 + 1e-5, atol=1e-6)


@every_way
def test_bf16_sums_in_f32(experts, m):
    e, d, f, used = 4, 64, 64, 2
    shapes = (1, e, f, d), (1, e, f, d), (1, e, d, f)
    w = {n: normal(*s, seed=i) / 8 for i, (n, s) in enumerate(zip(FIELDS[:3], shapes, strict=True))}
    p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params(**w))
    x, chosen, weights = jnp.asarray(normal(m, d), jnp.bfloat16), choices(m, used, e), normal(m, used, seed=8)
    got = run(experts, p, 0, x, chosen, weights)
    assert got.dtype == jnp.float32
    wide = {name: np.float64(getattr(p, name)[0]) for name in FIELDS[:3]}
    want = experts64(wide, np.float64(x), chosen, weights)
    # Two roundings to bf16, each half a unit at most: of hidden values, and of outputs where rows are many.
    assert np.linalg.norm(got - want) <= BF16_ULP / 2 * np.linalg.norm(want)


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-2, 3, shape).astype(np.float32)


LOADS = {
    "any": lambda rng, m: rng.random((m, 7)).argsort(-1)[:, :3],
    "three experts take all, three are idle": lambda rng, m: np.tile([5, 0, 3], (m, 1)),
    "one apart": lambda rng, m: np.where(np.arange(m)[:, None] == m // 2, [[4, 5, 6]], [[0, 1, 2]]),
    "one expert takes all": lambda rng, m: np.full((m, 1), 6),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("m", [1, FEW, FEW + 1, 131])
@every_experts
def test_exact_arithmetic_gives_exact_sums(experts, load, m):
    """Small integers: every sum is exact in f32, so that grouping must not show at all."""
    rng, e, d, f = np.random.default_rng(m), 7, 8, 6
    w = {"gate": integers(rng, 2, e, f, d), "up": integers(rng, 2, e, f, d), "down": integers(rng, 2, e, d, f)}
    w |= {"down_bias": integers(rng, 2, e, d), "scale": integers(rng, 2, e)}
    x, chosen, valid = integers(rng, m, d), load(rng, m).astype(np.int32), rng.random(m) < 0.8
    weights = integers(rng, *chosen.shape)
    got = run(experts, params(**w), 1, x, chosen, weights, valid, activation=jnp.multiply)
    want = experts64({n: np.float64(a[1]) for n, a in w.items()}, x, chosen, weights, np.multiply)
    np.testing.assert_array_equal(got, np.where(valid[:, None], want, 0))


@pytest.mark.parametrize("m", [1, 24])
def test_groups(m):
    chosen, valid = choices(m, 3, 8, seed=1) % 5 + 2, np.arange(m) % 4 != 1  # nobody chooses 0, 1 or 7
    g = jax.jit(group, static_argnums=2)(chosen, valid, 8)
    listed = [[m * 3 + a for m, a in np.argwhere(chosen == e) if valid[m]] for e in range(8)]
    assert g.order[: g.starts[-1]].tolist() == list(itertools.chain(*listed))
    assert np.diff(g.starts).tolist() == [len(one) for one in listed]
    assert g.active[: g.n_active].tolist() == [e for e in range(8) if listed[e]]


run_tiles = jax.jit(tiles, static_argnums=(2, 3))


def check_tiles(chosen: np.ndarray, valid: np.ndarray, experts: int, tile: int) -> None:
    """Against a stable sort, each expert's part of it padded to whole tiles."""
    (m, used), expert = chosen.shape, np.where(valid[:, None], chosen, experts).reshape(-1)
    got = run_tiles(jnp.asarray(chosen), jnp.asarray(valid), experts, tile)
    n = -(-m * used // tile) + min(experts, m * used)
    assert [(a.shape, a.dtype) for a in got] == [(s, jnp.int32) for s in ((m, used), (n * tile,), (experts + 1,))]
    place, source, starts = np.zeros(m * used, int), np.zeros(n * tile, int), np.zeros(experts + 1, int)
    order, first = np.argsort(expert, kind="stable"), 0
    for e in range(experts):
        mine = order[expert[order] == e]
        place[mine] = first * tile + np.arange(len(mine))
        source[place[mine]] = mine // used
        first -= -len(mine) // tile
        starts[e + 1] = first
    np.testing.assert_array_equal(got.place, place.reshape(m, used))
    np.testing.assert_array_equal(got.source, source)
    np.testing.assert_array_equal(got.starts, starts)


def test_tiles_of_all_patterns_of_empty_groups():
    rng = np.random.default_rng(0)
    for pattern in range(1, 256):
        busy = np.flatnonzero([pattern >> e & 1 for e in range(8)])
        check_tiles(rng.choice(busy, (24, 2)).astype(np.int32), rng.random(24) < 0.8, 8, 4)
    check_tiles(choices(24, 2, 8), np.zeros(24, bool), 8, 4)


@pytest.mark.parametrize(
    "sizes", [(8, 8), (7, 9), (1, 15), (16, 0), (0, 17), (9, 7, 1), (0, 0, 23, 1), (128, 127, 129)]
)
def test_tiles_of_groups_around_their_edges(sizes):
    chosen = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))[:, None]
    check_tiles(chosen, np.ones(len(chosen), bool), len(sizes), 8)


@pytest.mark.parametrize(
    ("m", "used", "experts", "tile"), [(1, 1, 1, 1), (1, 8, 128, 64), (300, 3, 60, 128), (97, 10, 512, 16)]
)
def test_tiles(m, used, experts, tile):
    check_tiles(choices(m, used, experts), np.random.default_rng(2).random(m) < 0.9, experts, tile)


def test_cost_follows_the_experts_with_tokens():
    m, e, d, seen = 32, 128, 32, []

    def decode(planes):
        jax.debug.callback(lambda: seen.append("weight"))
        return form.decode(planes)

    def activation(gate, up):
        jax.debug.callback(lambda: seen.append("tile"))
        return gate * up

    def cost(chosen, valid) -> tuple[int, int]:
        """How often a weight is decoded, and an expert applied to a tile of rows."""
        seen.clear()
        x, weights = np.ones((m, d), np.float32), np.ones(chosen.shape, np.float32)
        jax.block_until_ready(run(experts_reference, p, 0, x, np.int32(chosen), weights, valid, activation))
        jax.effects_barrier()
        return seen.count("weight"), seen.count("tile")

    form = FORMATS[GGMLQuantizationType["Q8_0"]]
    zeros = {name: jnp.zeros((1, e, d, 1, *kind.shape), kind.base) for name, (kind, _) in form.fields.fields.items()}
    w = Packed(zeros, dataclasses.replace(form, decode=decode))
    p, everyone, two = ExpertParams(w, w, w), np.ones(m, bool), np.tile([3, 90], (m, 1))
    assert cost(two, everyone) == (2 * 3, 2 * m / tile_of(2 * m, e))
    assert cost(two, np.arange(m) < 2) == (2 * 3, 2)
    assert cost(two, ~everyone) == (0, 0)
    assert cost(np.arange(2 * m).reshape(m, 2), everyone) == (2 * m * 3, 2 * m)


@pytest.mark.parametrize(
    ("assignments", "experts", "rows"), [(1, 128, 8), (72, 8, 16), (16384, 128, 128), (10**6, 2, 512)]
)
def test_tiles_are_about_the_mean_group(assignments, experts, rows):
    assert tile_of(assignments, experts) == rows


@every_way
def test_padding_is_zero_and_does_not_touch_the_others(experts, m):
    w = {name: normal(1, 3, 4, 4, seed=s) for s, name in enumerate(FIELDS[:3])}
    x, chosen, weights, valid = normal(m, 4), choices(m, 2, 3), normal(m, 2, seed=1), np.arange(m) % 3 > 0
    x[~valid], weights[~valid] = np.nan, np.inf
    got = run(experts, params(**w), 0, x, chosen, weights, valid)
    assert not got[~valid].any()
    want = experts64({n: np.float64(a[0]) for n, a in w.items()}, x[valid], chosen[valid], weights[valid])
    np.testing.assert_allclose(got[valid], want, atol=32 * ULP * np.abs(want).max())


def constants(*values: float) -> dict[str, np.ndarray]:
    """Experts whose outputs do not depend on their inputs."""
    e = len(values)
    zeros = {"gate": np.zeros((1, e, 2, 3)), "up": np.zeros((1, e, 2, 3)), "down": np.zeros((1, e, 3, 2))}
    bias = np.broadcast_to(np.array(values).reshape(1, e, 1), (1, e, 3))
    return {name: np.float32(a) for name, a in (zeros | {"down_bias": bias}).items()}


@every_way
def test_terms_are_added_in_the_order_of_choice(experts, m):
    values = np.float32([2**24, 1, 1.5, -(2**24)])
    chosen = np.array(list(itertools.permutations(range(4))), np.int32)[-m:]
    ones = np.ones((m, 4), np.float32)
    got = run(experts, params(**constants(*values)), 0, np.zeros((m, 3), np.float32), chosen, ones)
    want = np.zeros(m, np.float32)
    for a in range(4):
        want += values[chosen[:, a]]
    assert len(set(want.tolist())) > 2  # the order does show
    np.testing.assert_array_equal(got, np.repeat(want[:, None], 3, 1))


@every_experts
def test_few_rows_are_not_sorted(experts):
    p = params(**{name: np.ones((1, 4, 4, 4), np.float32) for name in FIELDS[:3]})

    def text(m: int) -> str:
        args = np.ones((m, 4), np.float32), np.ones((m, 2), np.int32), np.ones((m, 2), np.float32)
        return run.lower(experts, p, 0, *args).as_text()

    assert "stablehlo.sort" not in text(FEW)
    assert "stablehlo.sort" in text(FEW + 1)


@pytest.mark.optimised
@pytest.mark.parametrize("m", [1, FEW, 64])
def test_memory_holds_one_expert_at_a_time(m):
    e, d, f, used = 64, 256, 256, 2
    weights = {n: stack(GGMLQuantizationType["Q8_0"], 1, e, 256, 256, seed=0)[0] for n in FIELDS[:3]}
    args = np.ones((m, d), np.float32), np.ones((m, used), np.int32), np.ones((m, used), np.float32)
    compiled = run.lower(experts_reference, ExpertParams(**weights), 0, *args).compile()
    one = 3 * d * f * 4
    # A second expert's worth is for what decoding and the products of one leave behind; all experts were 64.
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * one + 4 * d * 4 * (m * used + tile_of(m * used, e))


# The layer.


def top(scores: np.ndarray, used: int) -> np.ndarray:
    """The indices of the largest, the lowest index first among equals."""
    return np.lexsort((np.arange(scores.shape[-1]), -scores))[:used]


def softmax64(r: np.ndarray) -> np.ndarray:
    e = np.exp(r - r.max())
    return e / e.sum()


def recipe_a(r, used):
    p = softmax64(r)
    s = top(p, used)
    return s, p[s] / max(p[s].sum(), 6.1035e-5)


def recipe_b(r, used):
    p = softmax64(r)
    s = top(p, used)
    return s, p[s]


def recipe_c(r, used):
    s = top(r, used)
    return s, softmax64(r[s])


def recipe_d(r, used):
    s = top(r, used)
    return s, sigmoid(r[s])


RECIPES = {
    "a": (routing.softmax_renormalised, recipe_a),
    "b": (routing.softmax_of_all, recipe_b),
    "c": (routing.softmax_of_chosen, recipe_c),
    "d": (routing.sigmoid_of_chosen, recipe_d),
}
every_recipe = pytest.mark.parametrize(("routing", "oracle"), RECIPES.values(), ids=RECIPES)


@every_recipe
@pytest.mark.parametrize("used", [1, 4, 9])
def test_recipes(routing, oracle, used):
    scores = 3 * normal(20, 9)
    chosen, weights = jax.jit(routing, static_argnums=1)(scores, used)
    want = [oracle(np.float64(r), used) for r in scores]
    np.testing.assert_array_equal(chosen, [s for s, _ in want])
    np.testing.assert_allclose(weights, [w for _, w in want], rtol=2e-6)  # exponentials of some 10, and a sum


@every_recipe
def test_ties_take_the_lowest_index(routing, oracle):
    scores = np.float32([[1, 1, 1, 1, 1, 1], [0, 2, 0, 2, 0, 2], [3, -1, 3, 3, -1, 4], [0, 0, -1, -1, 0, 0]])
    chosen, _ = jax.jit(routing, static_argnums=1)(scores, 4)
    assert chosen.tolist() == [[0, 1, 2, 3], [1, 3, 5, 0], [5, 0, 2, 3], [0, 1, 4, 5]]


def test_a_sum_of_weights_is_clamped_from_below():
    _, weights = routing.softmax_renormalised(jnp.zeros((1, 20000)), 1)
    np.testing.assert_allclose(weights, [[1 / 20000 / 6.1035e-5]], rtol=1e-5)


def random_moe(e: int, d: int, f: int, *, bias=False, shared=0, gated=False) -> dict[str, np.ndarray]:
    shapes = {"router": (e, d), "gate": (e, f, d), "up": (e, f, d), "down": (e, d, f)}
    shapes |= {"router_bias": (e,)} if bias else {}
    shapes |= {"s_gate": (shared, d), "s_up": (shared, d), "s_down": (d, shared)} if shared else {}
    shapes |= {"shared_gate": (d,)} if gated else {}
    return {n: normal(2, *s, seed=i) / np.float32(s[-1] ** 0.5) for i, (n, s) in enumerate(shapes.items())}


def moe_params(w: dict[str, np.ndarray]) -> MoeParams:
    w = {name: jnp.asarray(a) for name, a in w.items()}
    return MoeParams(
        router=Linear(w["router"], w.get("router_bias")),
        experts=ExpertParams(w["gate"], w["up"], w["down"]),
        shared=MlpParams(*(Linear(w[f"s_{n}"]) for n in FIELDS[:3])) if "s_gate" in w else None,
        shared_gate=w.get("shared_gate"),
    )


def moe64(w, x, oracle, used: int, weigh_inputs: bool, router_input=None) -> np.ndarray:
    w, out = {name: np.float64(a[1]) for name, a in w.items()}, []
    for row, seen in zip(np.float64(x), np.float64(x if router_input is None else router_input), strict=True):
        chosen, weights = oracle(w["router"] @ seen + w.get("router_bias", 0), used)
        if weigh_inputs:
            y = sum(expert64(w, e, a * row) for e, a in zip(chosen, weights, strict=True))
        else:
            y = sum(a * expert64(w, e, row) for e, a in zip(chosen, weights, strict=True))
        if "s_gate" in w:
            s = w["s_down"] @ silu64(w["s_gate"] @ row, w["s_up"] @ row)
            y = y + (sigmoid(w["shared_gate"] @ row) * s if "shared_gate" in w else s)
        out.append(y)
    return np.stack(out)


PARTS = {"a": {"shared": 24, "gated": True}, "b": {}, "c": {"bias": True}, "d": {"shared": 24}}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("shape", "apart"), [((1, 1), False), ((2, 9), True)], ids=["one", "many, router apart"])
def test_layer_against_float64(recipe, shape, apart):
    parts = PARTS[recipe] if not apart else {**PARTS[recipe], "gated": False}
    (routing, oracle), w, used = RECIPES[recipe], random_moe(6, 16, 20, **parts), 3
    x, seen = normal(*shape, 16, seed=20), normal(*shape, 16, seed=21) if apart else None
    pos = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    spec = MoeSpec(used=used, routing=routing, activation=silu_gate, weigh_inputs=recipe == "d")
    got = jax.jit(lambda p, *xs: moe(p, 1, *xs[:2], spec, REFERENCE, router_input=xs[2]))(moe_params(w), x, pos, seen)
    want = moe64(w, x.reshape(-1, 16), oracle, used, recipe == "d", None if seen is None else seen.reshape(-1, 16))
    assert np.abs(got.reshape(want.shape) - want).max() <= 32 * ULP * np.abs(want).max()  # sums of 16 to 24 terms


def test_a_router_with_an_input_of_its_own_has_no_gate_beside_it():
    x, spec = jnp.asarray(normal(1, 2, 16)), MoeSpec(used=2, routing=routing.softmax_renormalised, activation=silu_gate)
    with pytest.raises(ValueError, match="the gate of a shared expert takes what the router does"):
        moe(
            moe_params(random_moe(6, 16, 20, shared=24, gated=True)),
            1,
            x,
            jnp.zeros((1, 2), jnp.int32),
            spec,
            REFERENCE,
            router_input=x,
        )


def test_padding_gets_the_shared_expert_alone():
    """In a batch whose rows begin with padding; a token's output is that of the token by itself."""
    w = random_moe(6, 16, 20, shared=24)
    spec = MoeSpec(used=2, routing=routing.softmax_renormalised, activation=silu_gate)
    x, pos = normal(2, 12, 16), np.stack([np.arange(12) - 5, np.arange(12)]).clip(-1).astype(np.int32)
    p = moe_params(w)
    got = np.asarray(jax.jit(lambda p, x, pos: moe(p, 1, x, pos, spec, REFERENCE))(p, x, pos))
    want = moe64(w, x.reshape(-1, 16), recipe_a, 2, False).reshape(x.shape)
    bound = 32 * ULP * np.abs(want).max()
    np.testing.assert_allclose(got[pos >= 0], want[pos >= 0], rtol=0, atol=bound)
    shared = mlp(p.shared, 1, jnp.asarray(x), silu_gate, REFERENCE)
    np.testing.assert_allclose(got[pos < 0], shared[pos < 0], rtol=0, atol=bound)


@pytest.mark.parametrize("tokens", [3, 20])
def test_the_shared_expert_is_added_last(tokens):
    p = params(**constants(1, 1))
    zeros, big = jnp.zeros((1, 2, 3)), jnp.full((1, 3), 2.0**24)
    shared = MlpParams(Linear(zeros), Linear(zeros), Linear(jnp.zeros((1, 3, 2)), big))
    routed = MoeParams(Linear(jnp.zeros((1, 2, 3))), p, shared)

    def both(scores, used):
        return jnp.broadcast_to(jnp.arange(2), scores.shape), jnp.ones(scores.shape)

    spec = MoeSpec(used=2, routing=both, activation=silu_gate)
    pos = jnp.arange(tokens)[None]
    got = jax.jit(lambda p, x: moe(p, 0, x, pos, spec, REFERENCE))(routed, jnp.zeros((1, tokens, 3)))
    assert (np.asarray(got) == 2.0**24 + 2).all()  # added first, or between, it would swallow a 1
    assert np.float32(2**24) + np.float32(1) == 2**24


def test_the_router_is_f32_in_a_bf16_model():
    """Scores that differ by less than bf16 can tell still choose the better expert."""
    d = 8
    router = np.zeros((1, 2, d), np.float32)
    router[0, :, 0] = 1, 1 + 2**-12
    p = MoeParams(
        Linear(jnp.asarray(router)),
        params(**{n: np.stack([np.zeros((1, d, d)), np.ones((1, d, d))], 1).astype(np.float32) for n in FIELDS[:3]}),
    )
    spec = MoeSpec(used=1, routing=routing.softmax_renormalised, activation=jnp.multiply)
    y = jax.jit(lambda p, x: moe(p, 0, x, jnp.arange(3)[None], spec, REFERENCE))(p, jnp.ones((1, 3, d), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert (y == d**3).all()
