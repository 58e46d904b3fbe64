"""What the benchmarks of single operations share: many calls timed at once, what they are checked by, ceilings, tables.

Each backend computes a case once and is compared with what is right. A wrong one is shown with its error and not timed.
"""

import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from jaxinfer import memory
from jaxinfer.tree import Device

SHORT_S, SHORT_CALLS = 1e-3, 256  # calls that are shorter are made so many at a time, in one program
KEPT = 16  # of their results, and calls in a round of its loop, at least
SAMPLE_S = 0.1  # of many calls
SLOW_S = 2.0  # a call that is longer is timed once


class Ceilings(NamedTuple):
    """What a device reaches in the two works that products are made of."""

    flops: float  # a second, in a product of two matrices
    bytes: float  # a second, of a matrix that is read to be multiplied by a vector: XLA's copies are slower


type Bound = Literal["flops", "bytes"]
UNITS: dict[Bound, tuple[float, str]] = {"flops": (1e12, "TFLOP/s"), "bytes": (1e9, "GB/s")}


@runtime_checkable
class Case(Protocol):
    """A NamedTuple whose `shape` is one too, which has a name."""

    @property
    def shape(self) -> Any: ...
    @property
    def cells(self) -> tuple[str, ...]: ...  # what a table says of it; the last one is a size
    @property
    def need_bytes(self) -> int: ...  # of its arrays at once
    @property
    def tolerance(self) -> float: ...  # of the relative error, in the L2 norm
    def bound(self, ceiling: Ceilings, /) -> tuple[Bound, int]: ...  # what its time is bound by, and how much of it
    def _asdict(self) -> dict[str, Any]: ...


class Calls(NamedTuple):
    """A backend made ready for a case."""

    output: Callable[[], Any]
    repeat: Callable[[int], Callable[[], Any]]  # what puts so many calls in flight
    wait: Callable[[Any], Any] = jax.block_until_ready
    lower: Callable[[int], Any] | None = None  # the program of so many calls, where it is JAX's


class Backend(NamedTuple):
    name: str
    missing: Callable[[Device], str | None]  # why it cannot run on a device
    make: Callable[[Any], Calls]  # raises NotImplementedError for a case that it does not cover


class Benchmark(NamedTuple):
    """An operation's: its cases, who computes them, and their arrays with what gives the error of a result."""

    columns: dict[str, int]  # of `cells`, with their widths, below zero for text
    cases: Callable[..., list[Any]]
    backends: dict[str, Backend]
    prepare: Callable[[Any], tuple[Any, Callable[[Array], float]]]

    def choose(self, names: Sequence[str]) -> list[Backend]:
        if wrong := [name for name in names if name not in self.backends]:
            raise ValueError(f"{wrong} are no backends; known are {', '.join(self.backends)}")
        return [self.backends[name] for name in names]


class Row(NamedTuple):
    """What a backend did in a case; nothing was timed where a note says why not."""

    case: Case
    backend: str
    error: float | None = None  # relative, in the L2 norm
    mean_us: float | None = None
    stddev_us: float | None = None
    median_us: float | None = None
    bound: Bound | None = None
    rate: float | None = None  # of the median: FLOP/s or bytes/s
    share: float | None = None  # of the ceiling
    lower_s: float | None = None
    compile_s: float | None = None
    note: str = ""


def never(_: Device) -> None:
    return None


@partial(jax.jit, static_argnums=(1, 2))
def normal(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jax.random.normal(key, shape).astype(dtype)


def relative(o: ArrayLike, wanted: ArrayLike) -> float:
    """The error of a result, in the L2 norm."""
    o, wanted = np.asarray(o, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(o - wanted) / np.linalg.norm(wanted))


def of_jax(call: Callable[..., Any], varied: Any, stacks: Sequence[Any], layers: int = 1) -> Calls:
    """Of call(varied, stack, layer): call after call takes the next stack, round after round the next layer.

    So each weight of a walk is read from memory, and the index of a layer is data, as in a loop over layers. `varied`
    is what changes from layer to layer, such as the activations.
    """
    # Traced and lowered once, however often a program calls it; as a function of its own, or what another backend
    # traced would be found again, and not be timed.
    once = jax.jit(lambda *args: call(*args))
    rounds = SHORT_CALLS // max(KEPT, len(stacks))

    @cache
    def program(calls: int) -> Any:
        kept = math.gcd(calls, max(KEPT, len(stacks)))

        @jax.jit
        def run(varied: Any, stacks: Sequence[Any], first: Array) -> Any:
            def step(i: Array | int, carry: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
                # All results are kept, or the compiler would drop their calls; with the barrier a call waits for the
                # one before and is another one, or it would make them one, or decode a weight once for several.
                (varied, _), layer, found = carry, (first + i) % layers, []
                for k in range(kept):
                    o = once(varied, stacks[k % len(stacks)], layer)
                    varied, layer, o = lax.optimization_barrier((varied, layer, o))
                    found.append(o)
                return varied, found

            if calls == kept:
                return step(0, (varied, []))[1]
            o = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(once, varied, stacks[0], first))
            return lax.fori_loop(0, calls // kept, step, (varied, [o] * kept))[1]

        return run

    def turns(calls: int) -> list[tuple[Sequence[Any], Any]]:
        """Stacks and first layer of each run in turn."""
        if calls == 1:
            return [((stack,), np.int32(layer)) for layer in range(layers) for stack in stacks]
        return [(stacks, np.int32(layer)) for layer in range(0, layers, rounds)]

    def repeat(calls: int) -> Callable[[], Any]:
        run, turn = program(calls), cycle(turns(calls))
        return lambda: run(varied, *next(turn))

    return Calls(
        lambda: program(1)(varied, *turns(1)[-1])[0],
        repeat,
        lower=lambda calls: program(calls).lower(varied, *turns(calls)[0]),
    )


def ceilings(dtype: str, *, samples: int = 6) -> Ceilings:
    """Measured on the default device, with the timer of all else."""
    gpu = jax.devices()[0].platform == "gpu"
    width, rows = (8192, 2**16) if gpu else (512, 2**12)
    x, w = (normal(jax.random.key(i), (n, width), dtype) for i, n in enumerate((width, rows)))

    def multiply(x: Array, y: Array, _: Array) -> Array:
        return x @ y

    def read(varied: tuple[Array, Array], *_: Any) -> Array:
        x, w = varied
        return (w.astype(jnp.float32) * x).sum(1)

    product_s = median(seconds(of_jax(multiply, x, [x]), samples))
    read_s = median(seconds(of_jax(read, (x[0], w), [None]), samples))
    return Ceilings(2 * width**3 / product_s, w.nbytes / read_s)


def seconds(calls: Calls, samples: int = 6) -> list[float]:
    """Seconds of a call, in each of some samples that take about SAMPLE_S; one of a call that takes SLOW_S.

    All calls of a sample are in flight at once: to wait for each would cost an H200 0.4 ms a call.
    """

    if samples < 1:
        raise ValueError(f"{samples=} must be at least 1")

    def took(run: Callable[[], Any], times: int = 1) -> float:
        began, out = time.perf_counter(), None
        for _ in range(times):
            out = run()
        calls.wait(out)
        return time.perf_counter() - began

    run, many = calls.repeat(1), 1
    took(run)
    one = took(run)
    if one > SLOW_S:
        return [one]
    if one < SHORT_S:
        run, many = calls.repeat(SHORT_CALLS), SHORT_CALLS
        took(run)
    times = max(1, math.ceil(SAMPLE_S / took(run)))
    took(run, times)
    return [took(run, times) / (times * many) for _ in range(samples)]


def measure(
    benchmark: Benchmark,
    cases: Iterable[Case],
    backends: Sequence[Backend],
    ceiling: Ceilings,
    *,
    samples: int = 6,
    compiling: bool = False,
    busy: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """A row for each backend in each case, on the default device; `busy` is told what goes on.

    `compiling` also times what it takes to lower and to compile one call.
    """
    device = jax.devices()[0]
    limit = memory.available_bytes(device)
    missing = {backend.name: backend.missing(device) for backend in backends}
    for case in cases:
        busy(" ".join(case.cells))
        given = error = None  # the arrays of the case before
        if case.need_bytes <= limit:
            given, error = benchmark.prepare(case)
        for backend in backends:
            if why := missing[backend.name]:
                yield Row(case, backend.name, note=f"not available: {why}")
            elif error is None:
                need = memory.show(case.need_bytes)
                yield Row(
                    case, backend.name, note=f"not run: its arrays need {need}, and there are {memory.show(limit)}"
                )
            else:
                found = _result(backend, case, given, error, ceiling, samples, compiling)
                yield Row(case, backend.name, **found)


def _result(
    backend: Backend,
    case: Case,
    given: Any,
    error_of: Callable[[Array], float],
    ceiling: Ceilings,
    samples: int,
    compiling: bool,
) -> dict[str, Any]:
    """What a row says of a backend: it is checked, and timed if it is right."""
    found = {}
    try:
        calls = backend.make(given)
        if compiling and calls.lower:  # before all else, which would have traced it
            began = time.perf_counter()
            lowered = calls.lower(1)
            found["lower_s"] = time.perf_counter() - began
            lowered.compile()
            found["compile_s"] = time.perf_counter() - began - found["lower_s"]
        error = found["error"] = error_of(calls.output())
        if not error <= case.tolerance:  # nan is wrong too
            return found | {"note": f"wrong: an error above {case.tolerance:.1e}"}
        took = seconds(calls, samples)
    except NotImplementedError as error:
        return found | {"note": f"not covered: {_line(error)}"}
    except Exception as error:  # others' code, on shapes that it may never have seen: the others are still of interest
        return found | {"note": f"failed: {type(error).__name__}: {_line(error)}"}
    bound, amount = case.bound(ceiling)
    rate = amount / median(took)
    return found | {
        "mean_us": 1e6 * mean(took),
        "stddev_us": 1e6 * stdev(took) if len(took) > 1 else 0.0,
        "median_us": 1e6 * median(took),
        "bound": bound,
        "rate": rate,
        "share": rate / getattr(ceiling, bound),
    }


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:120]


def table(benchmark: Benchmark, rows: Iterable[Row], ceiling: Ceilings, *, compiling: bool = False) -> Iterator[str]:
    """The lines of a report, as the rows come. What a backend lacks is said once, and not for every size."""
    widths = benchmark.columns | {"backend": -16, "error": 8, "µs": 18, "speed": 13, "ceiling": 7}
    widths |= {"lower s": 7, "compile s": 9} if compiling else {}

    def line(*cells: str) -> str:
        aligned = (c.rjust(w) if w > 0 else c.ljust(-w) for c, w in zip(cells, widths.values(), strict=True))
        return f"| {' | '.join(aligned)} |"

    yield line(*widths)
    yield f"| {' | '.join('-' * (abs(w) - (w > 0)) + ':' * (w > 0) for w in widths.values())} |"
    said = set()
    for row in rows:
        cells = [*row.case.cells, row.backend, _number(row.error, ".1e"), "", "", ""]
        if row.mean_us is not None:
            assert row.bound
            took = f"{row.mean_us:.1f} ± {row.stddev_us:.1f}"
            cells[-3:] = took, _speed(row.rate or 0, row.bound), _number(row.share, ".1%")
        cells += [_number(row.lower_s, ".2f"), _number(row.compile_s, ".2f")] if compiling else []
        what = row.case.cells[:-1], row.backend, row.note
        if not row.note or what not in said:
            yield f"{line(*cells)} {row.note}".rstrip()
        said.add(what)
    reached = f"{_speed(ceiling.flops, 'flops')}, {_speed(ceiling.bytes, 'bytes')}"
    device = jax.devices()[0].device_kind
    yield f"\nbuild: jaxinfer {version('jaxinfer')}, jax {version('jax')}; device: {device}; ceilings: {reached}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _speed(rate: float, bound: Bound) -> str:
    scale, unit = (1e9, "GFLOP/s") if bound == "flops" and rate < 1e11 else UNITS[bound]
    return f"{rate / scale:.1f} {unit}"


def recorded(rows: Iterable[Row], path: str | Path) -> Iterator[Row]:
    """Passes rows on, and writes each to a CSV file as it comes."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for i, row in enumerate(rows):
            case, own = row.case._asdict(), row._asdict()
            shape = case.pop("shape")._asdict()
            del own["case"]
            cells = {"shape": shape.pop("name")} | shape | case | own
            if i == 0:
                writer.writerow(cells)
            writer.writerow(cells.values())
            file.flush()
            yield row
