"""Products of one x with several weights, as layers ask for them: by kernels that are interpreted, and without."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from models import random_blocks, rms_norm
from test_matvec import gate, shapes

from jaxinfer import decoder
from jaxinfer.cache import KVCache
from jaxinfer.decoder import Config, LayerParams
from jaxinfer.layers.attention import AttentionParams, AttentionSpec
from jaxinfer.layers.linear import Linear, linear, linears
from jaxinfer.layers.mlp import MlpParams
from jaxinfer.layers.rope import Rope, frequencies
from jaxinfer.ops import HOPPER, HOPPER_INT8, HOPPER_INVARIANT, REFERENCE
from jaxinfer.ops import matmul as matmul_ops
from jaxinfer.ops.matmul import Norm, matmul_hopper, matmul_reference, project_hopper, project_reference
from jaxinfer.pallas.limbs import narrowed
from jaxinfer.quants import FORMATS, Packed, Weight, dense

LAYERS, LAYER, WIDTH, EPS = 2, 1, 1024, 1e-3
KERNEL, DENSE = "[packed codes and activations of 15 bits]", "[weights as the tensor cores' left operand]"
NARROW = "24 x 1024 are not rows by 16 of units of 256, 4 at least"
PACKED = REFERENCE._replace(matmul=matmul_hopper, project=project_hopper)
quick = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops' kernels run on a CPU."""
    ops = matmul_ops
    for module, name in ((ops.matvec, "product"), (ops.halves, "product"), (ops.grouped, "ungrouped")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=True))


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def stack(kind: str, rows: int, width: int = WIDTH, seed: int = 0) -> tuple[Weight, np.ndarray]:
    """Layers of a weight, and the one that is used in float64."""
    if kind == "BF16":
        w = normal(LAYERS, rows, width, seed=seed) * jnp.bfloat16(2.0**-5)
        return w, np.asarray(w[LAYER], np.float64)
    form = FORMATS[GGMLQuantizationType[kind]]
    raw = random_blocks(GGMLQuantizationType[kind], (LAYERS, rows, width), std=width**-0.5, seed=seed)
    planes = form.split(raw.reshape(LAYERS, rows, -1, form.size))
    values = dequantize(raw[LAYER], GGMLQuantizationType[kind]).astype(np.float64)
    return Packed({name: jnp.asarray(plane) for name, plane in planes.items()}, form), values


def marks(f: Callable[..., Any], *args: Any) -> str:
    return jax.make_jaxpr(f)(*args).pretty_print(name_stack=True)


def check(got: jax.Array, want: np.ndarray, size: np.ndarray) -> None:
    """What is normed, a weight, a product and a sum are rounded to bf16, each by 2^-8 at most: they do not add up.

    The `size` of an element is the root of the sum of the squares of its terms. 6 * 2^-8 are 5 standard deviations.
    """
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_less(np.abs(np.asarray(got, np.float64) - want), 6 * 2.0**-8 * size + 2.0**-20)


def products(x: jax.Array, ws: Sequence[np.ndarray], norm: Norm | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each product and its size."""
    y = np.asarray(x, np.float64)
    y = y if norm is None else rms_norm(y, np.asarray(norm.weight[LAYER], np.float64), norm.eps)
    return [(y @ w.T, np.sqrt(y**2 @ (w**2).T)) for w in ws]


def combined(gates: tuple[np.ndarray, ...], ups: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of a gate by silu."""
    act = gate("silu")[1]
    size = np.hypot(1.2 * gates[1] * np.abs(ups[0]), np.abs(act(gates[0])) * ups[1])
    return act(gates[0]) * ups[0], size + 1.2 * gates[1] * 6 * 2.0**-8 * ups[1]


CASES = {  # batch and tokens, weights; what may follow a product has tests of its own, below
    "q, k, v": ((1, 2), (("Q4_K", 32), ("Q4_0", 16), ("Q8_0", 16))),
    "one by one": ((2, 2), (("Q4_K", 16), ("Q4_K", 24), ("BF16", 16))),
}


@quick
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("hopper", [True, False], ids=["hopper", "reference"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_float64(case, hopper):
    lead, kinds = case
    made = [stack(kind, rows, seed=i) for i, (kind, rows) in enumerate(kinds)]
    ws, values = tuple(w for w, _ in made), [v for _, v in made]
    x = normal(*lead, WIDTH, seed=7)
    norm = Norm(1 + normal(LAYERS, WIDTH, seed=9, dtype=jnp.float32) / 4, EPS)
    matmul, project = (matmul_hopper, project_hopper) if hopper else (matmul_reference, project_reference)

    def run(x, ws, layer, norm):
        return project(x, ws, layer, matmul=matmul, norm=norm)

    args = x, ws, jnp.int32(LAYER), norm
    assert (KERNEL in marks(run, *args)) == hopper
    got = (mosaic.interpret if hopper else lambda f, *args: f(*args))(jax.jit(run), *args)
    for y, (want, size) in zip(got, products(x, values, norm), strict=True):
        check(y, want, size)


def test_a_program_says_which_way_it_takes_and_why():
    def way(lead: tuple[int, ...], *kinds: tuple[str, int], width: int = WIDTH) -> str:
        ws = tuple(plain(LAYERS, rows, width) if kind == "BF16" else shapes(kind, rows, width) for kind, rows in kinds)
        run = partial(project_hopper, matmul=matmul_hopper)
        return marks(lambda x, ws, layer: run(x, ws, layer), plain(*lead, width), ws, jnp.int32(1))

    def plain(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    for lead in ((1, 1), (8, 1), (2, 2)):
        text = way(lead, ("Q4_K", 64), ("Q6_K", 64))
        assert KERNEL in text
        assert DENSE not in text
    for lead in ((1, 9), (4, 4), (2, 1024)):
        text = way(lead, ("Q4_K", 64), ("Q6_K", 64))
        assert DENSE in text
        assert "one by one" not in text
    low = "16 x 1024 are not rows by 64 of elements by 64, 256 at least"
    assert f"{KERNEL[:-1]}; {low}]" in way((1, 16), ("Q4_K", 16))
    assert f"[one by one; {low}]/[decoded by XLA; {low}]/[product]" in way((1, 17), ("Q4_K", 16))
    assert "[one by one; more than 2048 rows]/[decoded by XLA; more" in way((1, 2049), ("Q4_K", 64))
    assert "[decoded by XLA; more than 10485760 activations]" in way((1, 2048), ("Q4_K", 64), width=5376)
    assert "[product]" in way((1, 17), ("BF16", 64))
    text = way((1, 1), ("BF16", 16), ("BF16", 16))
    assert "[weights of 16 bits, in place]" in text
    assert "one by one" not in text
    text = way((1, 1), ("Q4_K", 16), ("Q4_K", 24))
    assert f"[one by one; {NARROW}]/{KERNEL}" in text  # what the kernel covers
    assert f"[one by one; {NARROW}]/[decoded by XLA; {NARROW}]/[multiply and sum, in place]" in text
    text = way((1, 1), ("Q4_K", 16), ("BF16", 16))
    assert f"[one by one; bfloat16 is not packed]/{KERNEL}" in text
    assert "[decoded by XLA; 16 x 768 are not rows" in way((1, 1), ("Q4_K", 16), width=768)


def test_which_products_are_invariant():
    """Packed and plain weights' of any number of rows; not a router's in f32, and it says so."""
    packed, plain = stack("Q4_K", 64)[0], normal(LAYERS, 64, WIDTH)

    def way(m: int, *ws: Weight, dtype: Any = jnp.bfloat16) -> str:
        x = normal(1, m, WIDTH, dtype=dtype)
        run = partial(HOPPER_INVARIANT.project, matmul=HOPPER_INVARIANT.matmul)
        return marks(lambda x, ws, layer: run(x, ws, layer), x, ws, jnp.int32(1))

    for m, ws in ((1, (packed, packed)), (1, (plain,)), (4, (packed,)), (2049, (packed,))):
        text = way(m, *ws)
        assert DENSE in text
        assert "one by one" not in text
    assert f"[one by one; one weight is packed, another is not]/{DENSE}" in way(1, packed, plain)
    why = "activations of float32"
    assert f"[one by one; {why}]/[not invariant; {why}]" in way(1, plain.astype(jnp.float32), dtype=jnp.float32)
    assert f"[not invariant; {why}]" in way(1, packed, dtype=jnp.float32)
    why = "activations of bfloat16 and weights of float16"
    assert f"[not invariant; {why}]" in way(1, plain.astype(jnp.float16))


@quick
@pytest.mark.usefixtures("interpreted")
def test_a_row_has_the_same_bits_among_any_number_of_rows():
    """Alone in a tile of 16, and in one of 32 with others that are nan; gate, up and activation are one launch."""
    (gate_w, gate_v), (up_w, up_v) = (stack("Q4_K", 64, 256, seed) for seed in (0, 1))
    x, before = normal(1, 21, 256, seed=7), normal(1, 21, 64, seed=8)
    run = partial(HOPPER_INVARIANT.project, matmul=HOPPER_INVARIANT.matmul, combine=gate("silu")[0])

    @jax.jit
    def step(x, before):
        return run(x, (gate_w, up_w), jnp.int32(LAYER), residual=before)[0]

    alone = mosaic.interpret(step, x[:, 20:], before[:, 20:])
    want, size = combined(*products(x[:, 20:], [gate_v, up_v], None))
    check(alone, want + np.asarray(before[:, 20:], np.float64), size + np.abs(before[:, 20:]))
    among = mosaic.interpret(step, *(a.at[:, :20].set(jnp.nan) for a in (x, before)))
    np.testing.assert_array_equal(among[:, 20], alone[:, 0])
    assert np.isnan(among[:, :20]).all()


@quick
@pytest.mark.usefixtures("interpreted")
def test_activations_of_8_bits():
    """Few rows and many have the same ones; a plain weight's are as they are."""
    w, values = stack("Q4_K", 64, 256)
    x = normal(1, 17, 256, seed=7)
    run = jax.jit(lambda x, w: HOPPER_INT8.matmul(x, w, LAYER))
    for m, form in ((2, "[packed codes and activations of 8 bits]"), (17, DENSE)):
        rows = x[:, :m]
        assert form in marks(run, rows, w)
        ((want, size),) = products(narrowed(rows), [values], None)
        check(mosaic.interpret(run, rows, w), want, size)
    plain = normal(LAYERS, 64, 256)
    np.testing.assert_array_equal(run(x, plain), jax.jit(lambda x, w: HOPPER.matmul(x, w, LAYER))(x, plain))
    assert "round" not in marks(run, x, plain)
    text = marks(run, jnp.tile(x, (1, 128, 1)), w)
    assert "[decoded by XLA; more than 2048 rows]" in text
    assert "round" in text


@quick
@pytest.mark.usefixtures("interpreted")
def test_a_weight_alone():
    """A head is no stack, and its products are f32."""
    w, values = stack("Q6_K", 32)
    alone, x = jax.tree.map(lambda plane: plane[LAYER], w), normal(1, 3, WIDTH)
    run = jax.jit(partial(matmul_hopper, dtype=jnp.float32))
    assert KERNEL in marks(run, x, alone)
    got = mosaic.interpret(run, x, alone)
    assert got.dtype == jnp.float32
    ((want, size),) = products(x, [values], None)
    check(got.astype(jnp.bfloat16), want, size)


@quick
@pytest.mark.usefixtures("interpreted")
def test_biases():
    """On some of the maps, which are one launch all the same; a combination comes after them."""
    biased = True, False
    made = [stack(kind, 16, seed=i) for i, kind in enumerate(("Q4_K", "Q6_K"))]
    biases = [3 * normal(LAYERS, v.shape[0], seed=20 + i, dtype=jnp.float32) for i, (_, v) in enumerate(made)]
    maps = tuple(Linear(w, b if yes else None) for (w, _), b, yes in zip(made, biases, biased, strict=True))
    x, norm = normal(1, 2, WIDTH, seed=7), Norm(1 + normal(LAYERS, WIDTH, seed=9, dtype=jnp.float32) / 4, EPS)

    def run(x, maps, layer):
        return linears(maps, layer, x, PACKED, norm=norm, combine=gate("silu")[0])

    text = marks(run, x, maps, jnp.int32(LAYER))
    assert KERNEL in text
    assert "one by one" not in text
    (got,) = mosaic.interpret(jax.jit(run), x, maps, jnp.int32(LAYER))
    wants = products(x, [v for _, v in made], norm)
    for i, b in enumerate(biases):
        if biased[i]:
            bias = np.asarray(b[LAYER], np.float64)
            wants[i] = wants[i][0] + bias, wants[i][1] + np.abs(bias)
    check(got, *combined(*wants))


@quick
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("biased", [False, True])
def test_a_map_with_a_residual(biased):
    """One launch where there is no bias."""
    w, values = stack("Q5_K", 16)
    bias = normal(LAYERS, 16, seed=3, dtype=jnp.float32)
    x, before = normal(2, 1, WIDTH, seed=7), normal(2, 1, 16, seed=8)
    p = Linear(w, bias if biased else None)
    run = jax.jit(lambda p, x, before: linear(p, LAYER, x, REFERENCE if biased else PACKED, before))
    got = (run if biased else partial(mosaic.interpret, run))(p, x, before)
    ((want, size),) = products(x, [values], None)
    for more in (np.asarray(before, np.float64), np.asarray(bias[LAYER], np.float64))[: 1 + biased]:
        want, size = want + more, size + np.abs(more)
    check(got, want, size)


def network(heads: int, width: int, ffn: int, o_kind: str, down_kind: str) -> tuple[LayerParams, Config]:
    """A layer as wide as the kernel needs, with heads of a width."""

    def one(kind: str, rows: int, seed: int, width: int = WIDTH) -> Linear:
        return Linear(stack(kind, rows, width, seed)[0])

    sizes = WIDTH, WIDTH, width, width
    norms = [1 + normal(LAYERS, n, seed=30 + i, dtype=jnp.float32) / 4 for i, n in enumerate(sizes)]
    q, k, v, o = (
        one("Q4_K", width * heads, 0),
        one("Q4_K", width, 1),
        one("Q4_K", width, 2),
        one(o_kind, WIDTH, 3, width * heads),
    )
    ffn_ = MlpParams(one("Q4_K", ffn, 4), one("Q4_K", ffn, 5), one(down_kind, WIDTH, 6, ffn))
    spec = AttentionSpec(
        kv_heads=1,
        group=heads,
        width=width,
        scale=width**-0.5,
        rope=Rope(tuple(frequencies(1e4, width)), False),
        eps=EPS,
    )
    config = Config(
        layers=LAYERS,
        width=WIDTH,
        vocab=0,
        context=64,
        eps=EPS,
        dtype=np.dtype(jnp.bfloat16),
        mixers=(("full", spec),),
    )
    return LayerParams(norms[0], AttentionParams(q, k, v, o, *norms[2:]), norms[1], ffn_), config


def kernels(jaxpr: Any) -> list[str]:
    """The names of the kernels that a program launches, one after the other."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "mpmd_map":
            found.append(eqn.params["name"])
        else:
            inner = jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns"))
            found += [name for one in inner if hasattr(one, "eqns") for name in kernels(getattr(one, "jaxpr", one))]
    return found


def test_a_layer_of_a_model_is_four_launches():
    """Norm and product of q, k, v; the output; of gate and up; of down. Each makes its limbs."""
    params, config = network(8, 128, 1024, "Q4_K", "Q6_K")
    ((_, spec),) = config.mixers
    cache = spec.cache(LAYERS, 1, 16, 1, jnp.bfloat16)

    def step(p, x, cache):
        return decoder.layer(p, LAYER, x, jnp.full((1, 1), 5), cache, config, PACKED)

    given = params, normal(1, 1, WIDTH), cache
    assert kernels(jax.make_jaxpr(step)(*given).jaxpr) == ["few_products"] * 4
    text = marks(lambda p, x, cache: step(p, x, cache), *given)
    assert "one by one" not in text
    assert HOPPER.project is PACKED.project
    assert HOPPER.matmul is PACKED.matmul


@quick
@pytest.mark.usefixtures("interpreted")
def test_a_layer_of_a_model():
    """Nearer to the reference in f32, on decoded weights, than the reference in bf16 is, which rounds more."""
    params, config = network(2, 32, 16, "BF16", "BF16")
    decoded = jax.jit(lambda p: jax.tree.map(dense, p, is_leaf=lambda w: isinstance(w, Packed)))(params)
    x, pos = normal(1, 1, WIDTH, seed=7), jnp.full((1, 1), 6)
    k, v = (normal(LAYERS, 1, 1, 16, 32, seed=s) for s in (40, 41))
    cache = KVCache(k, v, jnp.broadcast_to(jnp.where(jnp.arange(16) < 6, jnp.arange(16), -1), (LAYERS, 1, 1, 16)))

    @partial(jax.jit, static_argnums=3)
    def step(p, x, cache, ops):
        return decoder.layer(p, LAYER, x, pos, cache, config, ops)[0]

    cache_f32 = replace(cache, k=k.astype(jnp.float32), v=v.astype(jnp.float32))
    want = np.asarray(step(decoded, x.astype(jnp.float32), cache_f32, REFERENCE), np.float64)
    outs = step(params, x, cache, REFERENCE), mosaic.interpret(step, params, x, cache, PACKED)
    other, own = (np.linalg.norm(np.asarray(y, np.float64) - want) for y in outs)
    assert own <= other
