"""What a model's programs cost before they run: to trace, to lower and to compile, and which kernels that is for.

A program's kernels are traced with it. They are lowered with it too, in Python, but only as far as Mosaic's dialects:
what LLVM and ptxas make of them is made while XLA compiles the program, where no clock can tell them apart. So each
kernel is lowered and compiled once more in a program of its own, one after the other, where a run compiles them at once
(see programs.py). What XLA takes for such a program without a kernel, less than 0.1 s, is in a kernel's time. What a
program takes beyond its kernels is XLA's, and the tracing.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer import bench, engine
from jaxinfer.bench import BURST, Test
from jaxinfer.generate import default_chunk
from jaxinfer.loader import Description
from jaxinfer.memory import placed
from jaxinfer.sample import Sampler

KERNEL = "mpmd_map"  # the primitive that Pallas traces a kernel of Mosaic GPU to


class Cost(NamedTuple):
    """Seconds, of a program or of its kernels of one name."""

    program: str
    dtype: str  # of activations
    bodies: int  # of layers in the program
    kernel: str  # none: all of the program
    number: int  # of different kernels: each is lowered and compiled once, however often it is called
    trace_s: float | None  # of a program
    lower_s: float
    compile_s: float


def measure(found: Description, test: Test, *, chunk: int | None = None, burst: int = BURST) -> list[Cost]:
    """What the program of a test costs, a chunk of its prompt or decoding, and then its kernels, by name.

    Nothing is loaded or run. Where a process has traced a kernel before, it is not traced again: as in a run, the first
    program pays for what a second one shares with it.
    """
    for name, value in (("burst", burst), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    name, trace = _program(found, test, chunk or default_chunk(found.device), burst)
    traced, trace_s = _timed(trace)
    lowered, lower_s = _timed(traced.lower)
    _, compile_s = _timed(lowered.compile)
    different = kernels(traced)
    trunk = found.params.layers.segments + found.params.sharing.segments
    number, bodies = sum(map(len, different.values())), sum(len(pattern) for pattern, _ in trunk)
    dtype = str(found.model.config.dtype)
    costs = [Cost(name, dtype, bodies, "", number, trace_s, lower_s, compile_s)]
    for kernel, programs in different.items():
        lower_s = compile_s = 0.0
        for one in programs:
            lowered, seconds = _timed(one.lower)
            lower_s += seconds
            compile_s += _timed(lowered.compile)[1]
        costs.append(Cost(name, dtype, bodies, kernel, len(programs), None, lower_s, compile_s))
    return costs


def _program(found: Description, test: Test, chunk: int, burst: int) -> tuple[str, Callable[[], Any]]:
    """The name of a test's program, and what traces it as `bench.measure` would."""
    model, params, sampler = found.model, placed(found.params, found.expand), Sampler.greedy()
    chunks = [engine.chunk_for(tokens, chunk) if tokens else 1 for tokens in (test.prompt, test.depth)]
    slots = engine.slots_for(test.depth + test.prompt + test.new)
    cache = jax.eval_shape(lambda p: model.init_cache(p, 1, slots, chunk=max(chunks)), params)
    if test.prompt:
        ints = jax.ShapeDtypeStruct((1, chunks[0]), jnp.int32)
        name = f"prefill of {chunks[0]} tokens"
        return name, partial(engine.prefill.trace, model, params, ints, ints, cache, chunk=chunks[0])
    logits = jax.ShapeDtypeStruct((1, model.config.vocab), jnp.float32)
    state = jax.eval_shape(lambda x, c: engine.start(x, [[0]], c, sampler), logits, cache)
    keys, stops = jax.eval_shape(lambda: jax.random.key(0)[None]), jax.ShapeDtypeStruct((1,), jnp.int32)
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    args = model, params, state, keys, stops, limit
    return "decode", partial(engine.decode.trace, *args, sampler=sampler, room=burst)


def kernels(traced: Any) -> dict[str, list[Any]]:
    """The different kernels of a traced program by their names, each traced in a program of its own."""
    different: dict[Any, Any] = {}  # by what JAX finds a lowering again by
    for eqn in _equations(traced.jaxpr.jaxpr):
        if eqn.primitive.name == KERNEL:
            different[tuple(v.aval for v in eqn.invars), tuple(sorted(eqn.params.items()))] = eqn
    out: dict[str, list[Any]] = {}
    for eqn in different.values():
        program = jax.jit(lambda *args, eqn=eqn: eqn.primitive.bind(*args, **eqn.params))
        shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        out.setdefault(eqn.params["name"], []).append(program.trace(*shapes))
    return out


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program but for those within kernels."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name != KERNEL:
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "eqns"):
                    yield from _equations(getattr(inner, "jaxpr", inner))


def _timed(f: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    out = f()
    return out, time.perf_counter() - began


def table(costs: Iterable[Cost], form: str) -> Iterator[str]:
    """The lines of a report in one of bench.FORMS, as the costs come."""
    if form == "md":
        yield from _markdown(costs)
    else:
        yield from bench.table((cost._asdict() for cost in costs), form)


def _markdown(costs: Iterable[Cost]) -> Iterator[str]:
    widths = {"program": -22, "dtype": -8, "layer bodies": 12, "kernel": -16, "different": 9}
    widths |= {"trace s": 7, "lower s": 7, "compile s": 9}

    def line(*cells: str) -> str:
        aligned = (c.rjust(w) if w > 0 else c.ljust(-w) for c, w in zip(cells, widths.values(), strict=True))
        return f"| {' | '.join(aligned)} |"

    yield line(*widths)
    yield f"| {' | '.join('-' * (abs(w) - (w > 0)) + ':' * (w > 0) for w in widths.values())} |"
    for cost in costs:
        of = ("", "", "", cost.kernel) if cost.kernel else (cost.program, cost.dtype, str(cost.bodies), "all")
        trace = "" if cost.trace_s is None else f"{cost.trace_s:.2f}"
        yield line(*of, str(cost.number), trace, f"{cost.lower_s:.2f}", f"{cost.compile_s:.2f}")
    device = jax.devices()[0].device_kind
    yield f"\nbuild: jaxinfer {version('jaxinfer')}, jax {version('jax')}; device: {device}"
