"""Attention alone, on caches as models have them: our kernels beside those of others.

Each backend computes a case once, and the last of its queries are checked in float32. A wrong one is shown with its
error and not timed. The published benchmark of this kind: https://github.com/pytorch/executorch/pull/20198
"""

import csv
import importlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxinfer import memory
from jaxinfer.cache import KVCache, empty
from jaxinfer.engine import slots_for
from jaxinfer.ops import default_ops
from jaxinfer.ops.attention import attention_tiles
from jaxinfer.tree import Device

WORKS = ("prefill", "chunk", "decode")
LENGTHS = tuple(2**n for n in range(9, 18))
REPEATS, LAYER = 2, 1  # of the stack of caches, and the entry that is read
CHECKED = 128  # queries compared, the last ones: their scores fit at any length
# Relative L2 errors. Of 16 bits: several times what it is to round weights and results to bfloat16, 2 to 3e-3; two keys
# too many in a window of 1024 are 4e-2. Of float32: sums over 100,000 keys.
TOLERANCE = {"bfloat16": 2**-6, "float16": 2**-6, "float32": 1e-5}
SHORT_S, SHORT_CALLS = 1e-3, 256  # calls that are shorter are made so many at a time, in one program
KEPT = 16  # of their results
SAMPLE_S = 0.1  # of many calls
SLOW_S = 2.0  # a call that is longer is timed once


class Shape(NamedTuple):
    """The heads of a layer."""

    name: str
    heads: int
    kv_heads: int
    width: int
    window: int | None = None


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-8b", 32, 8, 128),
        Shape("gemma4-31b-sliding", 32, 16, 256, 1024),
        Shape("gemma4-31b-global", 32, 4, 512),
        Shape("qwen3.6", 16, 2, 256),
        Shape("llama-d64", 32, 8, 64),
    )
}


def shape_of(text: str) -> Shape:
    """A shape by its name, or as heads/KV heads/width or heads/KV heads/width/window."""
    if text in SHAPES:
        return SHAPES[text]
    numbers = text.split("/")
    if len(numbers) not in (3, 4) or not all(n.isdecimal() and int(n) for n in numbers):
        raise ValueError(f"{text!r} is no shape: known are {', '.join(SHAPES)}, or heads/KV heads/width[/window]")
    found = Shape(text, *map(int, numbers))
    if found.heads % found.kv_heads:
        raise ValueError(f"{text!r} is no shape: {found.heads} heads are no multiple of {found.kv_heads} KV heads")
    return found


class Case(NamedTuple):
    """The last `tokens` of `length` in each row of a batch attend to all that they see."""

    shape: Shape
    work: str
    length: int
    tokens: int
    batch: int
    dtype: str

    def __str__(self) -> str:
        tokens = f" {self.tokens}" if self.work == "chunk" or (self.work == "decode" and self.tokens > 1) else ""
        return f"{self.work}{tokens}" + (f" x {self.batch}" if self.batch > 1 else "")

    @property
    def window(self) -> int | None:
        """None where it is not shorter than the text."""
        return self.shape.window if self.shape.window and self.shape.window < self.length else None

    @property
    def keys(self) -> int:
        """Those that some query sees: the last ones."""
        return min(self.length, self.window + self.tokens - 1) if self.window else self.length

    @property
    def flops(self) -> int:
        """Of the two products, for what queries see alone."""
        seen = np.minimum(np.arange(self.length - self.tokens, self.length) + 1, self.window or self.length).sum()
        return 4 * self.batch * self.shape.heads * self.shape.width * int(seen)

    @property
    def kv_bytes(self) -> int:
        """Keys and values that some query sees."""
        return 2 * self.batch * self.shape.kv_heads * self.keys * self.shape.width * jnp.dtype(self.dtype).itemsize

    @property
    def need_bytes(self) -> int:
        """What the arrays take at once: the stack and a copy in order, queries and results, scores, a mask as bias."""
        slots, size = slots_for(self.length), jnp.dtype(self.dtype).itemsize
        rows = self.batch * self.shape.heads
        caches = 2 * (REPEATS + 2) * self.batch * self.shape.kv_heads * slots * self.shape.width * size
        scores = 3 * 4 * rows * min(self.tokens, CHECKED) * slots
        bias = self.tokens * self.keys * size if 1 < self.tokens < self.length else 0
        return caches + 5 * rows * self.tokens * self.shape.width * size + scores + bias


def cases(
    *,
    shapes: Sequence[str] = tuple(SHAPES),
    works: Sequence[str] = WORKS,
    lengths: Sequence[int] = LENGTHS,
    tokens: Sequence[int] = (1,),
    batch: Sequence[int] = (1,),
    chunk: int = 2048,
    dtype: str = "bfloat16",
) -> list[Case]:
    """Every work of every shape at every length: the whole text at once, its last chunk, or the last few `tokens`."""
    for name, values in (("lengths", lengths), ("tokens", tokens), ("batch", batch), ("chunk", [chunk])):
        if wrong := [v for v in values if v < 1]:
            raise ValueError(f"{name} must be at least 1, not {wrong}")
    if wrong := [work for work in works if work not in WORKS]:
        raise ValueError(f"{wrong} are no works; known are {', '.join(WORKS)}")

    def calls(work: str, length: int) -> list[int]:
        of_work = {"prefill": [length], "chunk": [chunk] if chunk < length else [], "decode": tokens}[work]
        if wrong := [t for t in of_work if t > length]:
            raise ValueError(f"tokens={wrong} are more than the {length=} of the text")
        return list(of_work)

    found = [
        Case(shape, work, length, t, b, dtype)
        for shape, work, b, length in product(map(shape_of, shapes), works, batch, lengths)
        for t in calls(work, length)
    ]
    if not found:
        raise ValueError(f"there is nothing to run: no length of {list(lengths)} is more than {chunk=}")
    return found


class Inputs(NamedTuple):
    case: Case
    q: Float[Array, "B T K G H"]
    cache: KVCache
    pos: Array  # [B, T]
    scale: float

    def in_order(self) -> tuple[Array, Array]:
        """The keys and values [B, K, S, H] that some query sees, in the order of positions, for those without rings."""
        slots = np.arange(self.case.length - self.case.keys, self.case.length) % self.cache.k.shape[3]
        return _take(self.cache.k, slots), _take(self.cache.v, slots)

    def seen(self) -> Bool[Array, "T S"]:
        """Which of them each query sees."""
        case = self.case
        key, query = jnp.arange(case.length - case.keys, case.length), self.pos[0, :, None]
        return (key <= query) & (key > query - (case.window or case.length))


@jax.jit
def _take(stack: Array, slots: Array) -> Array:
    return stack[LAYER][:, :, slots]


@partial(jax.jit, static_argnums=(1, 2))
def _random(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jax.random.normal(key, shape).astype(dtype)


def inputs(case: Case) -> Inputs:
    """Random ones, in a full cache or in the ring of a window, as calls of so many tokens would have left it."""
    _, heads, kv_heads, width, window = case.shape
    kinds = {"window": window, "chunk": case.tokens}
    made = partial(empty, REPEATS, case.batch, kv_heads, slots_for(case.length), width, case.dtype, **kinds)
    cache: KVCache = jax.eval_shape(made)
    q, k, v = (
        _random(key, shape, case.dtype)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 3),
            ((case.batch, case.tokens, kv_heads, heads // kv_heads, width), cache.k.shape, cache.v.shape),
            strict=True,
        )
    )
    slots, last = cache.k.shape[3], case.length - 1
    held = jnp.maximum(last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots, -1)  # the last to get there
    pos = jnp.tile(jnp.arange(case.length - case.tokens, case.length, dtype=jnp.int32), (case.batch, 1))
    cache = replace(cache, k=k, v=v, pos=jnp.broadcast_to(held, cache.pos.shape))
    return Inputs(case, q, cache, pos, width**-0.5)


def expected(given: Inputs) -> Float[Array, "B T K G H"]:
    """softmax(scale q k^T) v for the last queries, in float32, a KV head at a time."""
    window = given.case.shape.window or given.case.length

    @jax.jit
    def attend(q: Array, cache: KVCache, pos: Array) -> Array:
        b, t, kv_heads, group, width = q.shape
        held = cache.pos[LAYER, 0, 0]
        seen = (held >= 0) & (held <= pos[:, None]) & (held > pos[:, None] - window)  # [T, S]

        def head(x: tuple[Array, Array, Array]) -> Array:
            q, k, v = (a.astype(jnp.float32) for a in x)
            s = jnp.einsum("tgh,sh->gts", q, k, precision=lax.Precision.HIGHEST) * given.scale
            weights = jax.nn.softmax(jnp.where(seen, s, -jnp.inf))
            return jnp.einsum("gts,sh->tgh", weights, v, precision=lax.Precision.HIGHEST)

        kv = [a[LAYER].reshape(b * kv_heads, -1, width) for a in (cache.k, cache.v)]
        o = lax.map(head, (q.swapaxes(1, 2).reshape(b * kv_heads, t, group, width), *kv))
        return o.reshape(b, kv_heads, t, group, width).swapaxes(1, 2)

    return attend(given.q[:, -CHECKED:], given.cache, given.pos[0, -CHECKED:])


class Attend(NamedTuple):
    """A backend made ready for a case."""

    output: Callable[[], Array]  # [B, T, K, G, H], or K and G as one
    repeat: Callable[[int], Callable[[], Any]]  # what puts so many calls in flight
    wait: Callable[[Any], Any] = jax.block_until_ready


class Backend(NamedTuple):
    name: str
    missing: Callable[[Device], str | None]  # why it cannot run on a device
    make: Callable[[Inputs], Attend]  # raises NotImplementedError for a case that it does not cover


def _of_jax(attend: Callable[..., Array], varied: Any, *operands: Any) -> Attend:
    """Of a function of arrays; `varied` is what changes from layer to layer, such as the queries."""
    attend = jax.jit(attend)  # traced and lowered once, however often a program calls it

    @cache
    def repeat(calls: int) -> Callable[[], Any]:
        kept = math.gcd(calls, KEPT)

        @jax.jit
        def run(varied: Any, *operands: Any) -> Any:
            def step(_: Any, carry: tuple[Any, list[Array]]) -> tuple[Any, list[Array]]:
                # All results are kept, or the compiler would drop their calls; with the barrier a call waits for the
                # one before and is another one, or it would make them one.
                (varied, _), found = carry, []
                for _ in range(kept):
                    varied, o = lax.optimization_barrier((varied, attend(varied, *operands)))
                    found.append(o)
                return varied, found

            if calls == kept:
                return step(0, (varied, []))[1]
            o = jax.eval_shape(attend, varied, *operands)
            return lax.fori_loop(0, calls // kept, step, (varied, [jnp.zeros(o.shape, o.dtype)] * kept))[1]

        return partial(run, varied, *operands)

    return Attend(lambda: repeat(1)()[0], repeat)


def _over_cache(attention: Callable[..., Array], given: Inputs, **options: Any) -> Attend:
    """Of one with the signature of `attention_reference`; the entry of the stack is data, as in a loop over layers."""
    options |= {"scale": given.scale, "window": given.case.shape.window}

    def attend(varied: tuple[Array, Array], cache: KVCache, pos: Array) -> Array:
        q, layer = varied
        return attention(q, cache, layer, pos, **options)

    return _of_jax(attend, (given.q, jnp.int32(LAYER)), given.cache, given.pos)


def _default(given: Inputs) -> Attend:
    return _over_cache(default_ops(jax.devices()[0], jnp.dtype(given.case.dtype)).attention, given)


def _portable(given: Inputs) -> Attend:
    from jaxinfer.pallas.flash_mma import attention_mma

    return _over_cache(attention_mma, given, hopper=float(jax.devices()[0].compute_capability) >= 9)


def _whole(given: Inputs) -> Attend:
    from jaxinfer.pallas.flash import flash_attention

    if given.case.work == "decode":
        raise NotImplementedError("only chunks are run without skipping")
    return _over_cache(flash_attention, given, skip=False)


def _unsplit(given: Inputs) -> Attend:
    from jaxinfer.pallas.flash import flash_attention

    if given.case.work != "decode":
        raise NotImplementedError("only decoding splits keys")
    return _over_cache(flash_attention, given)


def _cudnn(given: Inputs) -> Attend:
    """A whole text is plain causal attention; for a later chunk its mask is a bias."""
    case, bias = given.case, None
    attend = partial(jax.nn.dot_product_attention, scale=given.scale, implementation="cudnn")
    if case.tokens == case.length:
        attend = partial(attend, is_causal=True, local_window_size=(case.window - 1, 0) if case.window else None)
    elif case.tokens > 1:
        bias = jnp.where(given.seen(), 0.0, -jnp.inf).astype(case.dtype)[None, None]
    q = given.q.reshape(case.batch, case.tokens, case.shape.heads, case.shape.width)
    k, v = (a.swapaxes(1, 2) for a in given.in_order())
    return _of_jax(attend, q, k, v, bias)


def _example(given: Inputs) -> Attend:
    """It knows no scale and float16 alone: queries are scaled before, and all is cast, outside of what is timed."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    case, half = given.case, jnp.float16
    if case.tokens < case.length or case.window:
        raise NotImplementedError("whole texts without a window alone")
    # Its fastest blocks on an H200 for heads of 128; wider ones have room for fewer keys.
    keys = 128 if case.shape.width <= 128 else 64
    config = attention_mgpu.TuningConfig(block_q=64, block_kv=keys, max_concurrent_steps=2, causal=True)
    q = given.q.reshape(case.batch, case.tokens, case.shape.heads, case.shape.width)
    k, v = (a.swapaxes(1, 2).astype(half) for a in given.in_order())
    q = (q.astype(jnp.float32) * given.scale).astype(half)
    return _of_jax(lambda q, k, v: attention_mgpu.attention(q, k, v, config), q, k, v)


def _torch(given: Inputs, name: str) -> Attend:
    """PyTorch's, on the same memory, its calls in a CUDA graph: launched one by one, the short ones would wait."""
    import torch  # pyright: ignore[reportMissingImports] (optional)
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.bias import causal_lower_right  # pyright: ignore[reportMissingImports]

    case = given.case
    if case.window and case.tokens > 1 and (name != "CUDNN_ATTENTION" or case.tokens == case.length):
        raise NotImplementedError("no windows")
    q = given.q.reshape(case.batch, case.tokens, case.shape.heads, case.shape.width).swapaxes(1, 2)
    q, k, v = (torch.from_dlpack(a) for a in jax.block_until_ready((q, *given.in_order())))
    options: dict[str, Any] = {"scale": given.scale, "enable_gqa": True}
    if case.tokens == case.length:
        options["is_causal"] = True
    elif case.tokens > 1 and name == "CUDNN_ATTENTION":  # its causal mask starts at the first key
        options["attn_mask"] = torch.from_dlpack(jax.block_until_ready(given.seen()))
    elif case.tokens > 1:
        options["attn_mask"] = causal_lower_right(case.tokens, case.keys)

    def attend() -> Any:
        with sdpa_kernel(getattr(SDPBackend, name)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    def wait(_: Any = None) -> None:
        if q.is_cuda:
            torch.cuda.synchronize()

    def output() -> Array:
        o = attend().transpose(1, 2).contiguous()
        wait()
        return jnp.from_dlpack(o)

    def repeat(calls: int) -> Callable[[], Any]:
        if not q.is_cuda:
            return lambda: [attend() for _ in range(calls)][-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):  # JAX's threads may use the driver meanwhile
            for _ in range(calls):
                attend()
        return graph.replay

    return Attend(output, repeat, wait)


def _never(_: Device) -> None:
    return None


def _no_gpu(device: Device) -> str | None:
    return None if device.platform == "gpu" else f"made for NVIDIA GPUs, and this is a {device.platform}"


def _no_example(device: Device) -> str | None:
    return _no_gpu(device) or _no_module("jax.experimental.pallas.ops.gpu.attention_mgpu")


def _no_torch(device: Device) -> str | None:
    if why := _no_module("torch"):
        return why
    import torch  # pyright: ignore[reportMissingImports]

    return None if device.platform != "gpu" or torch.cuda.is_available() else "this PyTorch has no CUDA"


def _no_module(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a library that it needs
        return str(error)
    return None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("jaxinfer", _never, _default),
        Backend("jaxinfer-no-skip", _no_gpu, _whole),
        Backend("jaxinfer-unsplit", _no_gpu, _unsplit),
        Backend("jaxinfer-mma", _no_gpu, _portable),
        Backend("reference", _never, partial(_over_cache, attention_tiles)),
        Backend("cudnn", _no_gpu, _cudnn),
        Backend("pallas-example", _no_example, _example),
        Backend(
            "torch-cudnn", lambda device: _no_gpu(device) or _no_torch(device), partial(_torch, name="CUDNN_ATTENTION")
        ),
        Backend("torch-flash", _no_torch, partial(_torch, name="FLASH_ATTENTION")),
    )
}


class Ceilings(NamedTuple):
    """What a device reaches in the two works that attention is made of."""

    flops: float  # a second, in a product of two matrices
    bytes: float  # a second, of a matrix that is read to be multiplied by a vector: XLA's copies are slower


def ceilings(dtype: str, *, samples: int = 6) -> Ceilings:
    """Measured on the default device, with the timer of attention."""
    gpu = jax.devices()[0].platform == "gpu"
    width, rows = (8192, 2**16) if gpu else (512, 2**12)
    x, w = (_random(jax.random.key(i), (n, width), dtype) for i, n in enumerate((width, rows)))

    def read(varied: tuple[Array, Array]) -> Array:
        x, w = varied
        return (w.astype(jnp.float32) * x).sum(1)

    product_s = median(seconds(_of_jax(jnp.matmul, x, x), samples))
    read_s = median(seconds(_of_jax(read, (x[0], w)), samples))
    return Ceilings(2 * width**3 / product_s, w.nbytes / read_s)


def seconds(attend: Attend, samples: int = 6) -> list[float]:
    """Seconds of a call, in each of some samples that take about SAMPLE_S; one of a call that takes SLOW_S.

    All calls of a sample are in flight at once: to wait for each would cost an H200 0.4 ms a call.
    """

    if samples < 1:
        raise ValueError(f"{samples=} must be at least 1")

    def took(run: Callable[[], Any], times: int = 1) -> float:
        began, out = time.perf_counter(), None
        for _ in range(times):
            out = run()
        attend.wait(out)
        return time.perf_counter() - began

    run, calls = attend.repeat(1), 1
    took(run)
    one = took(run)
    if one > SLOW_S:
        return [one]
    if one < SHORT_S:
        run, calls = attend.repeat(SHORT_CALLS), SHORT_CALLS
        took(run)
    times = max(1, math.ceil(SAMPLE_S / took(run)))
    took(run, times)
    return [took(run, times) / (times * calls) for _ in range(samples)]


class Row(NamedTuple):
    """What a backend did in a case; nothing was timed where a note says why not."""

    case: Case
    backend: str
    error: float | None = None  # relative, in the L2 norm
    mean_us: float | None = None
    stddev_us: float | None = None
    median_us: float | None = None
    rate: float | None = None  # of the median: FLOP/s, of decoding bytes/s of keys and values
    share: float | None = None  # of the ceiling
    note: str = ""


def choose(names: Sequence[str]) -> list[Backend]:
    if wrong := [name for name in names if name not in BACKENDS]:
        raise ValueError(f"{wrong} are no backends; known are {', '.join(BACKENDS)}")
    return [BACKENDS[name] for name in names]


def measure(
    cases: Iterable[Case],
    backends: Sequence[Backend],
    ceiling: Ceilings,
    *,
    samples: int = 6,
    busy: Callable[[str], None] = lambda _: None,
) -> Iterator[Row]:
    """A row for each backend in each case, on the default device; `busy` is told what goes on."""
    device = jax.devices()[0]
    limit = memory.available_bytes(device)
    missing = {backend.name: backend.missing(device) for backend in backends}
    for case in cases:
        busy(f"{case.shape.name}: {case} of {case.length}")
        given = wanted = None  # the arrays of the case before
        if case.need_bytes <= limit:
            given = inputs(case)
            wanted = expected(given)
        for backend in backends:
            if why := missing[backend.name]:
                yield Row(case, backend.name, note=f"not available: {why}")
            elif given is None or wanted is None:
                need = memory.show(case.need_bytes)
                yield Row(
                    case, backend.name, note=f"not run: its arrays need {need}, and there are {memory.show(limit)}"
                )
            else:
                yield Row(case, backend.name, **_result(backend, given, wanted, ceiling, samples))


def _result(backend: Backend, given: Inputs, wanted: Array, ceiling: Ceilings, samples: int) -> dict[str, Any]:
    """What a row says of a backend: it is checked, and timed if it is right."""
    case = given.case
    try:
        attend = backend.make(given)
        o = attend.output()[:, -CHECKED:].reshape(wanted.shape).astype(jnp.float32)
        error = float(jnp.linalg.norm(o - wanted) / jnp.linalg.norm(wanted))
        if not error <= TOLERANCE[case.dtype]:  # nan is wrong too
            return {"error": error, "note": f"wrong: an error above {TOLERANCE[case.dtype]:.1e}"}
        took = seconds(attend, samples)
    except NotImplementedError as error:
        return {"note": f"not covered: {_line(error)}"}
    except Exception as error:  # others' code, on shapes that it may never have seen: the others are still of interest
        return {"note": f"failed: {type(error).__name__}: {_line(error)}"}
    of, most = (case.kv_bytes, ceiling.bytes) if case.work == "decode" else (case.flops, ceiling.flops)
    rate = of / median(took)
    return {
        "error": error,
        "mean_us": 1e6 * mean(took),
        "stddev_us": 1e6 * stdev(took) if len(took) > 1 else 0.0,
        "median_us": 1e6 * median(took),
        "rate": rate,
        "share": rate / most,
    }


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:120]


def table(rows: Iterable[Row], ceiling: Ceilings) -> Iterator[str]:
    """The lines of a report, as the rows come. What a backend lacks is said once for each shape and work."""
    widths = {"shape": -18, "work": -10, "tokens": 7, "backend": -16, "error": 8, "µs": 18, "speed": 13, "ceiling": 7}

    def line(*cells: str) -> str:
        aligned = (c.rjust(w) if w > 0 else c.ljust(-w) for c, w in zip(cells, widths.values(), strict=True))
        return f"| {' | '.join(aligned)} |"

    yield line(*widths)
    yield f"| {' | '.join('-' * (abs(w) - (w > 0)) + ':' * (w > 0) for w in widths.values())} |"
    said = set()
    for row in rows:
        about = row.case.shape.name, str(row.case), str(row.case.length), row.backend
        if row.mean_us is None:
            what = row.case.shape, str(row.case), row.backend, row.note
            if what not in said:
                yield f"{line(*about, _error(row), '', '', '')} {row.note}"
            said.add(what)
            continue
        assert row.stddev_us is not None
        assert row.rate is not None
        assert row.share is not None
        speed = f"{row.rate / 1e9:.1f} GB/s" if row.case.work == "decode" else f"{row.rate / 1e12:.1f} TFLOP/s"
        took = f"{row.mean_us:.1f} ± {row.stddev_us:.1f}"
        yield line(*about, _error(row), took, speed, f"{row.share:.1%}")
    reached = f"{ceiling.flops / 1e12:.1f} TFLOP/s, {ceiling.bytes / 1e9:.1f} GB/s"
    device = jax.devices()[0].device_kind
    yield f"\nbuild: jaxinfer {version('jaxinfer')}, jax {version('jax')}; device: {device}; ceilings: {reached}"


def _error(row: Row) -> str:
    return "" if row.error is None else f"{row.error:.1e}"


def recorded(rows: Iterable[Row], path: str | Path) -> Iterator[Row]:
    """Passes rows on, and writes each to a CSV file as it comes."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("shape", *Shape._fields[1:], *Case._fields[1:], *Row._fields[1:]))
        for row in rows:
            writer.writerow((*row.case.shape, *row.case[1:], *row[1:]))
            file.flush()
            yield row


def plot(rows: Iterable[Row], path: str | Path) -> None:
    """Draws speed by length, a line for each backend, in axes for each work of a shape.

    The file's type is that of its name, such as .png. Needs matplotlib, which `jaxinfer[plot]` installs.
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports] (optional)
    except ImportError:
        raise ValueError(f"{path}: a plot needs matplotlib: pip install 'jaxinfer[plot]'") from None
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row.rate:
            groups.setdefault((row.case.shape.name, str(row.case)), {}).setdefault(row.backend, []).append(row)
    if not groups:
        raise ValueError(f"{path}: there is nothing to plot: no backend was timed")
    columns = len({work for _, work in groups})
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    for i, ((shape, work), backends) in enumerate(groups.items()):
        axes = figure.add_subplot(lines, columns, 1 + i)
        unit, name = (1e9, "GB/s") if work.startswith("decode") else (1e12, "TFLOP/s")
        axes.set(title=f"{shape}: {work}", xlabel="tokens", ylabel=name, xscale="log")
        for backend, some in backends.items():
            rate = np.array([row.rate or 0 for row in some]) / unit
            deviation = rate * [(row.stddev_us or 0) / (row.mean_us or 1) for row in some]
            axes.errorbar([row.case.length for row in some], rate, deviation, label=backend, marker="o", capsize=2)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    figure.savefig(path)
