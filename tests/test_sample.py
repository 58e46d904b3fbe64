"""The samplers against llama.cpp's results, draws against exact distributions, and what must not change a token."""

import json
import re
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import batched
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.sample import Sampler, draw

pytestmark = pytest.mark.usefixtures("quick_compiler")

DATA = Path(__file__).parent / "data" / "sampling"
OFF = Sampler(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
WIDTH = 2000  # of the longest golden vector; the others are filled up with -inf, which no step may choose
BATCH = 8  # cases at a time
TOLERANCE = 1e-6  # on probabilities, as the goldens' README says: sums of up to 2000 float32 terms in another order


@pytest.fixture(scope="module")
def goldens():
    arrays = dict(np.load(DATA / "sampling.npz"))
    return arrays | {"cases": json.loads(str(arrays["cases"]))}


def covered(case) -> bool:
    """Whether this package has all the samplers that do something in the case."""
    inert = {
        "dry": lambda s: s["multiplier"] == 0,
        "top_n_sigma": lambda s: s["n"] <= 0,
        "typical": lambda s: s["p"] >= 1,
        "xtc": lambda s: s["probability"] == 0,
        "temp_ext": lambda s: s["range"] == 0,
    }
    return all(inert.get(s["sampler"], lambda s: s.get("min_keep", 0) <= 1)(s) for s in case["steps"])


def sampler_of(steps) -> Sampler:
    sampler = OFF
    for s in steps:
        match s["sampler"]:
            case "penalties":
                sampler = replace(
                    sampler,
                    repeat_last_n=max(s["last_n"], 0),
                    repeat_penalty=s["repeat"],
                    presence_penalty=s["present"],
                    frequency_penalty=s["freq"],
                )
            case "top_k":
                sampler = replace(sampler, top_k=max(s["k"], 0))
            case "top_p" | "min_p":
                sampler = replace(sampler, **{s["sampler"]: s["p"]})
            case "temp" | "temp_ext":
                sampler = replace(sampler, temperature=max(s["t"], 0))
    return sampler


def chosen(sampler, logits, histories):
    """For each row: the probabilities [B, V] by id, which ids are left [B, V], and the greedy token [B]."""
    last = [history[-sampler.window :] if sampler.window else [] for history in histories]
    history = jnp.asarray([[-1] * (sampler.window - len(row)) + row for row in last], jnp.int32)
    greedy = replace(sampler, temperature=0)(jax.random.split(jax.random.key(0), len(last)), logits, history)
    if sampler.temperature == 0:
        left, ids = jnp.zeros((len(last), 1)), greedy[:, None]
    else:
        left, ids = sampler.filter(logits, history)
    by_id = jnp.full(logits.shape, -jnp.inf).at[jnp.arange(len(last))[:, None], ids].set(left)
    return np.asarray(jax.nn.softmax(by_id)), np.asarray(by_id > -jnp.inf), np.asarray(greedy)


@pytest.mark.parametrize(
    ("group", "count"), [("single", 461), ("penalties", 141), ("usual", 60), ("default", 37), ("temp0", 35)]
)
def test_candidates_match_llama_cpp(goldens, group, count):
    cases = [c for c in goldens["cases"] if c["group"] == group and covered(c)]
    assert len(cases) == count
    alike = defaultdict(list)  # cases of one sampler, which are rows of one batch
    for case in cases:  # a stage on the edge is the last one that can be compared
        edges = [i for i, stage in enumerate(case["stages"]) if stage.get("edge")]
        last = edges[0] if edges else len(case["stages"]) - 1
        alike[sampler_of(case["steps"][: last + 1])].append((case, case["stages"][last]))
    for sampler, some in alike.items():
        for rows in batched(some, BATCH):
            logits = np.full((BATCH, WIDTH), -np.inf, np.float32)
            for row, (case, _) in zip(logits, rows, strict=False):
                start, stop = goldens["vector_offset"][case["vector"] :][:2]
                row[: stop - start] = goldens["vector_logits"][start:stop]
            logits[len(rows) :] = 0
            histories = [case["history"] for case, _ in rows] + [[]] * (BATCH - len(rows))
            found = chosen(sampler, jnp.asarray(logits), histories)
            for (case, stage), row, *one in zip(rows, logits, *found, strict=False):
                compare(goldens, case, sampler, stage, row, *one)


def compare(goldens, case, sampler, stage, logits, probs, left, greedy):
    expected = np.zeros(WIDTH, np.float32)
    at = slice(stage["at"], stage["at"] + stage["n"])
    ids = goldens["ids"][at]
    expected[ids] = goldens["probs"][at]
    alive = ids[np.isfinite(logits[ids])] if sampler.temperature else np.flatnonzero(expected)

    if stage.get("edge"):
        assert abs(left.sum() - len(alive)) <= 1
        return
    assert left.sum() == len(alive)
    if any(s.get("tie_at_cut") for s in case["stages"]):  # which of the equals stays is an accident of the sort
        probs, expected = np.sort(probs), np.sort(expected)
    else:
        assert set(np.flatnonzero(left)) == set(alive)
        assert expected[greedy] == expected.max()  # of equals we take the lowest id, a sort another
    np.testing.assert_allclose(probs, expected, rtol=0, atol=TOLERANCE)


def test_greedy_is_the_lowest_id_of_equals():
    golden = np.load(DATA / "argmax.npz")
    keys = jax.random.split(jax.random.key(0), 60)
    tokens = Sampler.greedy()(keys, jnp.asarray(golden["logits"]), jnp.zeros((60, 0), jnp.int32))
    np.testing.assert_array_equal(tokens, golden["greedy"])


LOGITS = np.array([2.0, -1.0, 0.5, 1.5, 0.0, 1.9, -3.0, 0.7, 1.0, -0.5], np.float32)


def exact(weights):
    return np.where(weights > 0, weights, 0) / weights.sum()


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (replace(OFF, temperature=1.5), exact(np.exp(LOGITS.astype(float) / 1.5))),
        (replace(OFF, min_p=0.3), exact(np.exp(LOGITS) * (np.exp(LOGITS - 2.0) >= 0.3))),
        (replace(OFF, top_k=4, temperature=0.7), exact(np.exp(LOGITS / 0.7) * (np.argsort(np.argsort(-LOGITS)) < 4))),
    ],
    ids=["temperature", "min_p", "top_k"],
)
def test_draws_have_the_exact_frequencies(sampler, expected):
    n = 20_000
    keys = jax.random.split(jax.random.key(7), n)
    tokens = sampler(keys, jnp.broadcast_to(LOGITS, (n, 10)), jnp.zeros((n, 0), jnp.int32))
    seen = np.bincount(tokens, minlength=10)
    assert not seen[expected == 0].any()
    kept = expected > 0
    chi_square = ((seen - n * expected)[kept] ** 2 / (n * expected[kept])).sum()
    assert chi_square < 34  # 9 degrees of freedom exceed 33.7 once in 10,000 seeds, fewer degrees more rarely


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-23])
def test_draw_takes_nothing_without_mass(monkeypatch, u):
    """The first and the last random number there is, on rows where most of the mass is zero."""
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.float32(u))
    logits = np.full((3, 5000), -np.inf, np.float32)
    logits[0, 4000:4100] = np.linspace(-5, 5, 100)
    logits[1, 17] = 1e4
    logits[2, ::7] = np.random.default_rng(0).normal(size=715)
    index = draw(jax.random.split(jax.random.key(0), 3), jnp.asarray(logits))
    assert np.isfinite(np.take_along_axis(logits, np.asarray(index)[:, None], 1)).all()


SAMPLERS = [
    Sampler(),
    Sampler(top_k=0, min_p=0.0),
    Sampler(top_k=0, top_p=1.0, temperature=1.2),
    Sampler(repeat_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1, repeat_last_n=8),
    Sampler(temperature=0, repeat_penalty=1.3),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_row_depends_on_nothing_but_itself(sampler):
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(scale=2, size=(6, 301)).astype(np.float32)).at[3:].set(np.nan).at[5].set(-jnp.inf)
    history = jnp.asarray(rng.integers(-1, 301, (6, sampler.window)), jnp.int32)
    keys = jax.random.split(jax.random.key(11), 6)
    together = sampler(keys, logits, history)
    assert ((together >= 0) & (together < 301)).all()  # also in rows of NaN and of -inf
    for i in range(3):
        row = slice(i, i + 1)
        assert sampler(keys[row], logits[row], history[row])[0] == together[i]
        assert sampler(keys[row], logits[row], history[row, ::-1])[0] == together[i]


def test_bfloat16_logits_are_sampled_in_f32():
    logits = jax.random.normal(jax.random.key(0), (64, 200), jnp.bfloat16)
    keys, history = jax.random.split(jax.random.key(1), 64), jnp.zeros((64, 0), jnp.int32)
    np.testing.assert_array_equal(
        Sampler()(keys, logits, history), Sampler()(keys, logits.astype(jnp.float32), history)
    )


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 5e-324])
def test_a_tiny_temperature_takes_the_best(temperature):
    logits = jnp.asarray(LOGITS[None] * 1000)
    for sampler in (replace(OFF, temperature=temperature), Sampler(temperature=temperature)):
        assert sampler(jax.random.split(jax.random.key(0), 1), logits[:, ::-1], jnp.zeros((1, 0), jnp.int32))[0] == 9


def test_another_seed_is_the_same_sampler():
    chex.clear_trace_counter()

    @partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(sampler, keys, logits, history):
        return sampler(keys, logits, history)

    arguments = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 50)), jnp.zeros((2, 0), jnp.int32)
    for seed in (0, 1, 2**32 - 1):
        step(Sampler(seed=seed), *arguments)


@pytest.mark.parametrize("sampler", [Sampler.greedy(), replace(OFF, min_p=0.1), OFF], ids=repr)
def test_nothing_is_sorted_without_need(sampler):
    arguments = jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 64)), jnp.zeros((1, 0), jnp.int32)
    assert not re.search(r"\b(sort|top_k)\b", str(jax.make_jaxpr(sampler)(*arguments)))


def test_window_is_zero_without_penalties():
    assert Sampler().window == 0
    assert Sampler(presence_penalty=0.1).window == 64
    assert Sampler(frequency_penalty=0.1, repeat_last_n=0).window == 0
    with pytest.raises(ValueError, match=r"history.shape=\(1, 3\).*self.window=64"):
        Sampler(repeat_penalty=1.1)(
            jax.random.split(jax.random.key(0), 1), jnp.zeros((1, 9)), jnp.zeros((1, 3), jnp.int32)
        )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, np.nan, np.inf, 1e39]),
        ("top_k", [-1, True]),
        ("top_p", [-0.1, 1.1, np.nan]),
        ("min_p", [-0.1, 1.1, np.nan]),
        ("repeat_penalty", [0.0, -1.0, np.nan, np.inf, 1e-46]),
        ("presence_penalty", [np.nan, -np.inf]),
        ("frequency_penalty", [np.nan, np.inf]),
        ("repeat_last_n", [-1]),
        ("seed", [-1, 2**32]),
    ],
)
def test_a_value_out_of_range_is_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name}=.* must be "):
            Sampler(**{name: value})
