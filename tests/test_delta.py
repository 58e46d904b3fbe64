"""The gated delta net against float64 numpy: the rule token by token and head by head, in both forms; and the layer."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import rms_norm, silu

from jaxinfer.layers.delta import DeltaParams, DeltaSpec, delta, empty_state
from jaxinfer.layers.linear import Linear
from jaxinfer.ops import REFERENCE
from jaxinfer.ops import delta as delta_ops

pytestmark = pytest.mark.usefixtures("quick_compiler")

FEW = delta_ops.FEW
FORMS = {"recurrent": delta_ops.gated_delta_reference, "chunked": delta_ops.gated_delta_chunked}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
# Of a head's largest number in o or in the state. f32's half unit is 6e-8; sums of 64 terms in the system, over the
# state and in the output follow each other, and what goes wrong decays as the state does. The most that either form
# was found off by is 1.9e-6, over 1000 tokens; this is four times as much.
BOUND = 8e-6

run = jax.jit(lambda form, grouped, *x: form(*x, grouped=grouped), static_argnums=(0, 1))


def unit(x: np.ndarray, eps: float = 0) -> np.ndarray:
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + eps)


def rule(q, k, v, log_decay, beta, m, grouped: bool) -> tuple[np.ndarray, np.ndarray]:
    """The definition in float64: (o [B, T, N, U], state)."""
    q, k, v, log_decay, beta, m = (np.array(a, np.float64) for a in (q, k, v, log_decay, beta, m))
    rows, tokens, heads, _ = v.shape
    o = np.zeros_like(v)
    for b in range(rows):
        for n in range(heads):
            key = n // (heads // k.shape[2]) if grouped else n % k.shape[2]
            for t in range(tokens):
                m[b, n] *= np.exp(log_decay[b, t, n])
                wrong = v[b, t, n] - m[b, n].T @ k[b, t, key]
                m[b, n] += np.outer(k[b, t, key], beta[b, t, n] * wrong)
                o[b, t, n] = m[b, n].T @ q[b, t, key]
    return o, m


DECAYS = {  # log_decay of [T, N] tokens
    "hardly any": lambda rng, shape: -rng.uniform(0, 1e-3, shape),
    "of all sizes": lambda rng, shape: -np.exp(rng.uniform(np.log(1e-4), np.log(20), shape)),
    "strong": lambda rng, shape: -rng.uniform(15, 20, shape),
    "none but resets": lambda rng, shape: np.where(rng.uniform(size=shape) < 0.05, -2000.0, -1e-4),
}


def inputs(tokens: int, dtype: str = "float32", seed: int = 0) -> list[np.ndarray]:
    """A row for each kind of decay with keys that point anywhere, and again with keys that are nearly the same."""
    rng = np.random.default_rng(seed)
    rows, keys, heads, s, u = 2 * len(DECAYS), 2, 6, 16, 24
    q = unit(rng.standard_normal((rows, tokens, keys, s))) / s**0.5
    k = rng.standard_normal((rows, tokens, keys, s))
    k[len(DECAYS) :] = k[len(DECAYS) :, :1] + 0.1 * k[len(DECAYS) :]
    v = rng.standard_normal((rows, tokens, heads, u))
    log_decay = np.stack([f(rng, (tokens, heads)) for f in (*DECAYS.values(), *DECAYS.values())])
    beta = rng.uniform(0, 1, (rows, tokens, heads))
    beta[len(DECAYS) :] = 1 - beta[len(DECAYS) :] * 1e-3
    state = rng.standard_normal((rows, heads, s, u))
    return [a.astype(dtype) for a in (q, unit(k), v, log_decay, beta, state)]


def assert_close(got, want: tuple[np.ndarray, np.ndarray], bound: float = BOUND):
    """o and state, each head within `bound` of its own largest number."""
    for a, b in zip(got, want, strict=True):
        axes = (1, 3) if a is got[0] else (2, 3)
        assert a.shape == b.shape
        error, size = np.abs(np.float64(a) - b).max(axes), np.abs(b).max(axes)
        assert (error <= bound * size).all(), (error / size).max()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("tokens", "grouped"), [(1, True), (63, False), (64, True), (65, False), (300, True)])
def test_both_forms_are_the_rule(tokens, grouped, dtype):
    x = inputs(tokens, dtype)
    want = rule(*x, grouped=grouped)
    with jax.enable_x64(dtype == "float64"):
        for form in FORMS.values():
            got = run(form, grouped, *x)
            assert [a.dtype for a in got] == [dtype, dtype]
            assert_close(got, want, BOUND if dtype == "float32" else 1e-12)


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (FEW, FEW), (FEW + 1, 1), (64, 1), (65, 2), (300, 5)])
def test_the_chunked_form_takes_a_step_a_chunk_and_the_recurrence_for_few_tokens(tokens, steps):
    program = jax.make_jaxpr(partial(FORMS["chunked"], grouped=True))(*inputs(tokens))
    assert [e.params["length"] for e in program.eqns if e.primitive.name == "scan"] == [steps]


@every_form
def test_padding_leaves_the_state_bit_for_bit(form):
    """Row 0 is all padding, row 1 has a whole chunk of it, row 2 a little, row 3 none; its numbers are anything."""
    tokens, pads = 80, [80, 64, 5, 0]
    q, k, v, log_decay, beta, state = (a[:4].copy() for a in inputs(tokens))
    for row, n in enumerate(pads):
        log_decay[row, :n] = beta[row, :n] = 0
    o, after = run(form, False, q, k, v, log_decay, beta, state)
    np.testing.assert_array_equal(after[0], state[0])
    for row, n in enumerate(pads[1:], 1):
        alone = [a[row : row + 1, n:] for a in (q, k, v, log_decay, beta)] + [state[row : row + 1]]
        assert_close((o[row : row + 1, n:], after[row : row + 1]), rule(*alone, grouped=False))
    one = run(form, False, *(a[:, :1] for a in (q, k, v)), 0 * log_decay[:, :1], 0 * beta[:, :1], state)[1]
    np.testing.assert_array_equal(one, state)


def test_equal_keys_and_no_decay_are_exact():
    """The worst system there is: beta = 1 replaces the state's only row each time, so that o is v. All in integers."""
    v = np.random.default_rng(0).integers(-9, 9, (1, 128, 2, 3)).astype(np.float32)
    q = k = np.zeros((1, 128, 1, 4), np.float32) + np.eye(4, dtype=np.float32)[1]
    o, state = run(FORMS["chunked"], True, q, k, v, 0 * v[..., 0], 0 * v[..., 0] + 1, np.zeros((1, 2, 4, 3), "f4"))
    np.testing.assert_array_equal(o, v)
    np.testing.assert_array_equal(state[:, :, 1], v[:, -1])


OPS = REFERENCE._replace(delta=FORMS["chunked"])
EPS, INTO, REPEATS = 1e-4, 20, 2


def layer_of(*, grouped: bool, kernel: int = 4, fused: bool = False) -> tuple[DeltaParams, DeltaSpec]:
    rng = np.random.default_rng(1)
    spec = DeltaSpec(key_heads=2, value_heads=6, width=12, kernel=kernel, grouped=grouped, eps=EPS)

    def linear(rows: int, columns: int = INTO) -> Linear:
        return Linear(jnp.asarray(rng.standard_normal((REPEATS, rows, columns), np.float32) / np.float32(columns**0.5)))

    def array(*shape: int, low: float = 0.0, high: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.uniform(low, high, (REPEATS, *shape)), jnp.float32)

    n, channels = spec.value_heads, 2 * spec.keys + spec.values
    p = DeltaParams(
        qkv=linear(channels),
        z=linear(spec.values),
        conv=array(channels, kernel, low=-1.0),
        a=-jnp.exp(array(n, low=-4.0, high=2.0)),
        dt_bias=array(n, low=-1.0),
        norm=array(spec.width, low=0.5, high=1.5),
        out=linear(INTO, spec.values),
        beta=linear(2 * n if fused else n),
        alpha=None if fused else linear(n),
    )
    return p, spec


def wanted(p: DeltaParams, spec: DeltaSpec, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The second layer of the stack for one row of tokens, from nothing: (y, the last projections, the state)."""
    w: Any = jax.tree.map(lambda a: np.asarray(a[1], np.float64), p)
    c, z, beta = (x @ projection.weight.T for projection in (w.qkv, w.z, w.beta))
    if w.alpha is None:  # for each key head three of beta, then three of alpha
        alpha, beta = beta[:, [3, 4, 5, 9, 10, 11]], beta[:, [0, 1, 2, 6, 7, 8]]
    else:
        alpha = x @ w.alpha.weight.T
    y = np.zeros_like(c)
    for t in range(len(x)):
        for j in range(spec.kernel):
            if t - j >= 0:
                y[t] += w.conv[:, spec.kernel - 1 - j] * c[t - j]
    y = silu(y)
    heads = [y[:, : spec.keys], y[:, spec.keys : 2 * spec.keys], y[:, 2 * spec.keys :]]
    q, k, v = (a.reshape(1, len(x), -1, spec.width) for a in heads)
    log_decay, beta = w.a * np.log1p(np.exp(alpha + w.dt_bias)), 1 / (1 + np.exp(-beta))
    q, k = unit(q, EPS) / spec.width**0.5, unit(k, EPS)
    m = np.zeros((1, spec.value_heads, spec.width, spec.width))
    o, m = rule(q, k, v, log_decay[None], beta[None], m, spec.grouped)
    y = rms_norm(o[0], w.norm, EPS).reshape(len(x), -1) * silu(z)
    return y @ w.out.weight.T, c[len(c) - (spec.kernel - 1) :], m[0]


@partial(jax.jit, static_argnums=(0, 1))
def apply(spec, ops, p, layer, x, pos, held):
    return delta(p, layer, x, pos, held, spec, ops)


def left_padded(rows: list[np.ndarray], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [t, D] as a call of so many tokens: (x, where padding is not even a number, and pos)."""
    x, pos = np.full((len(rows), tokens, INTO), np.nan, np.float32), np.full((len(rows), tokens), -1, np.int32)
    for i, row in enumerate(rows):
        x[i, tokens - len(row) :], pos[i, tokens - len(row) :] = row, np.arange(len(row))
    return x, pos


def near(got, want: np.ndarray):
    # The rule's bound, and sums of 20 and 72 terms before and after it; one head's numbers may be small beside others'.
    assert got.shape == want.shape
    assert np.abs(np.float64(got) - want).max() <= 2 * BOUND * np.abs(want).max()


LAYERS = {
    "tiled": {"grouped": False},
    "grouped": {"grouped": True},
    "alpha with beta, kernel of 2": {"grouped": True, "fused": True, "kernel": 2},
}


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_layer_over_calls_that_continue(case):
    """Three rows: one padded in both calls, one that the second call leaves alone, one whose first call has 2 tokens,
    fewer than the convolution looks back.

    Only the second layer of a stack; then two calls of one token, in which the first row has ended.
    """
    p, spec = layer_of(**case)
    rng = np.random.default_rng(2)
    counts = [(5, 9, 0, 0), (70, 0, 1, 1), (2, 12, 1, 1)]
    rows = [rng.standard_normal((sum(c), INTO), np.float32) for c in counts]
    held, seen, got = empty_state(REPEATS, 3, spec), [0, 0, 0], [[], [], []]
    for call, tokens in enumerate((70, 70, 1, 1)):
        ends = [seen[i] + counts[i][call] for i in range(3)]
        x, pos = left_padded([rows[i][seen[i] : ends[i]] for i in range(3)], tokens)
        before = held
        y, held = apply(spec, OPS, p, jnp.int32(1), x, pos, held)
        for i in range(3):
            got[i].append(y[i, tokens - counts[i][call] :])
            if not counts[i][call]:
                np.testing.assert_array_equal(held.conv[:, i], before.conv[:, i])
                np.testing.assert_array_equal(held.state[:, i], before.state[:, i])
        seen = ends
    assert not held.conv[0].any()
    assert not held.state[0].any()
    for i in range(3):
        y, conv, state = wanted(p, spec, rows[i])
        near(np.concatenate(got[i]), y)
        near(held.conv[1, i], conv)
        near(held.state[1, i], state)


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_a_prompt_gives_the_same_in_any_chunks_and_in_any_batch(chunk):
    p, spec = layer_of(grouped=False)
    rows = [np.random.default_rng(i).standard_normal((n, INTO), np.float32) for i, n in enumerate((100, 37))]
    length = -(-100 // chunk) * chunk
    x, pos = left_padded(rows, length)
    held, ys = empty_state(REPEATS, 2, spec), []
    for start in range(0, length, chunk):
        y, held = apply(spec, OPS, p, jnp.int32(1), x[:, start : start + chunk], pos[:, start : start + chunk], held)
        ys.append(y)
    for i, row in enumerate(rows):
        y, conv, state = wanted(p, spec, row)
        near(np.concatenate(ys, axis=1)[i, length - len(row) :], y)
        near(held.conv[1, i], conv)
        near(held.state[1, i], state)


def test_layer_in_bf16_keeps_its_state_in_f32():
    p, spec = layer_of(grouped=True)
    row = np.asarray(jnp.asarray(np.random.default_rng(3).standard_normal((30, INTO)), jnp.bfloat16), np.float32)
    y, held = apply(
        spec, OPS, p, 1, jnp.asarray(row[None], jnp.bfloat16), np.arange(30)[None], empty_state(REPEATS, 1, spec)
    )
    assert (y.dtype, held.conv.dtype, held.state.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    want, _, state = wanted(p, spec, row)
    # Weights, projections and the product before the last are rounded to bf16, by 2**-9 of each at most.
    assert np.linalg.norm(np.float64(y[0]) - want) <= 2**-6 * np.linalg.norm(want)
    assert np.linalg.norm(np.float64(held.state[1, 0]) - state) <= 2**-6 * np.linalg.norm(state)


def test_silence_and_the_strongest_decay_give_numbers():
    """Keys of length zero, and rates at which a token forgets everything."""
    p, spec = layer_of(grouped=False)
    sizes = np.array([0, 1, 1e4], np.float32)[:, None, None]
    x = sizes * np.random.default_rng(0).standard_normal((3, 70, INTO), np.float32)
    p = dataclasses.replace(p, a=p.a * 1e4)
    pos = np.tile(np.arange(70, dtype=np.int32), (3, 1))
    y, held = apply(spec, OPS, p, jnp.int32(1), x, pos, empty_state(REPEATS, 3, spec))
    assert all(np.isfinite(a).all() for a in (y, held.conv, held.state))
    assert not y[0].any()
