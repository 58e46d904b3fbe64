"""How calls are timed: many in flight, none dropped or merged, each with weights that were not read for long."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import timing
from jaxinfer.timing import Calls, of_jax, seconds


@pytest.mark.parametrize(
    ("one_s", "first", "program", "times"),
    [(2.5, [1, 1], 0, 0), (0.03, [1, 1, 1], 1, 4), (2**-12, [1, 1, 256, 256], 256, 2)],
    ids=["slow", "long", "short"],
)
def test_many_calls_are_in_flight(monkeypatch, one_s, first, program, times):
    """On a device that takes `one_s` for a call: each of 3 samples of a tenth of a second waits once."""
    made, waits, now = [], [], [0.0]

    def repeat(calls: int) -> Callable[[], None]:
        def run() -> None:
            made.append(calls)
            now[0] += calls * one_s

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    took = seconds(Calls(lambda: jnp.zeros(()), repeat, waits.append), samples=3)
    assert took == pytest.approx([one_s] * (3 if program else 1))
    assert made == first + [program] * times * 4  # one to warm up
    assert len(waits) == len(first) + (4 if program else 0)


def compiled(calls: Calls) -> str:
    assert calls.lower
    return calls.lower(256).compile().as_text()


def test_no_call_is_dropped_or_merged():
    """In the compiled program: a loop of 16 rounds with 16 products each, of which plain calls would leave one."""
    x = jnp.ones((64, 64))
    text = compiled(of_jax(lambda x, w, _: x @ w, x, [x]))
    assert len(re.findall(r" (?:dot|custom-call)\(", text)) == 16
    assert re.search(r'known_trip_count\D+"16"', text)


def test_a_weight_is_decoded_anew_by_each_call():
    """Eight calls of a round read the same layer of one of two stacks."""
    stacks = [jnp.ones((3, 64, 64), jnp.int8) * n for n in (1, 2)]

    def call(x: jax.Array, stack: jax.Array, layer: jax.Array) -> jax.Array:
        return x @ jnp.sin(stack[layer].astype(jnp.float32))

    text = compiled(of_jax(call, jnp.ones((64, 64)), stacks, layers=3))
    assert len(re.findall(r" sine\(", text)) == 16


@pytest.mark.parametrize(("n", "layers"), [(1, 1), (2, 3), (16, 40), (32, 1)])
def test_calls_walk_through_stacks_and_layers(n, layers):
    """Values say where they were read. A program's results are those of its last round."""
    stacks = [100.0 * k + jnp.arange(layers) for k in range(n)]
    calls = of_jax(lambda x, stack, layer: x + stack[layer], jnp.zeros(()), stacks, layers)
    assert calls.output() == 100 * (n - 1) + layers - 1  # the last of all, which is the one that is checked
    one = calls.repeat(1)
    walk = [float(one()[0]) for _ in range(2 * n * layers)]
    assert walk == [100 * k + layer for layer in range(layers) for k in range(n)] * 2
    many, kept = calls.repeat(256), max(n, 16)
    for first in [*range(0, layers, 256 // kept)] * 2:  # each run goes on where the one before stopped
        last = (first + 256 // kept - 1) % layers
        np.testing.assert_array_equal(many(), [100 * (k % n) + last for k in range(kept)])
