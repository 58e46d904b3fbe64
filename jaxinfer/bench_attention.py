"""Attention alone, on caches as models have them: our kernels beside those of others.

Of each case the last queries are checked, in float32. The published benchmark of this kind:
https://github.com/pytorch/executorch/pull/20198
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxinfer.cache import KVCache, empty
from jaxinfer.engine import slots_for
from jaxinfer.ops import default_ops
from jaxinfer.ops.attention import attention_tiles
from jaxinfer.timing import UNITS, Backend, Benchmark, Bound, Calls, Ceilings, Row, never, normal, of_jax, relative
from jaxinfer.tree import Device

WORKS = ("prefill", "chunk", "decode")
LENGTHS = tuple(2**n for n in range(9, 18))
REPEATS, LAYER = 2, 1  # of the stack of caches, and the entry that is read
CHECKED = 128  # queries compared, the last ones: their scores fit at any length
# Relative L2 errors. Of 16 bits: several times what it is to round weights and results to bfloat16, 2 to 3e-3; two keys
# too many in a window of 1024 are 4e-2. Of float32: sums over 100,000 keys.
TOLERANCE = {"bfloat16": 2**-6, "float16": 2**-6, "float32": 1e-5}


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
    def cells(self) -> tuple[str, ...]:
        return self.shape.name, str(self), str(self.length)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    def bound(self, _: Ceilings) -> tuple[Bound, int]:
        return ("bytes", self.kv_bytes) if self.work == "decode" else ("flops", self.flops)

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


def inputs(case: Case) -> Inputs:
    """Random ones, in a full cache or in the ring of a window, as calls of so many tokens would have left it."""
    _, heads, kv_heads, width, window = case.shape
    kinds = {"window": window, "chunk": case.tokens}
    made = partial(empty, REPEATS, case.batch, kv_heads, slots_for(case.length), width, case.dtype, **kinds)
    cache: KVCache = jax.eval_shape(made)
    q, k, v = (
        normal(key, shape, case.dtype)
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


def prepare(case: Case) -> tuple[Inputs, Callable[[Array], float]]:
    """A case's arrays, and what gives the error of a result."""
    given = inputs(case)
    wanted = expected(given)
    return given, lambda o: relative(o[:, -CHECKED:].reshape(wanted.shape), wanted)


def _of(attend: Callable[..., Array], varied: Any, *operands: Any) -> Calls:
    """Of attend(varied, *operands): all calls read the same entry of a stack."""
    return of_jax(lambda varied, operands, _: attend(varied, *operands), varied, [operands])


def _over_cache(attention: Callable[..., Array], given: Inputs, **options: Any) -> Calls:
    """Of one with the signature of `attention_reference`; the entry of the stack is data, as in a loop over layers."""
    options |= {"scale": given.scale, "window": given.case.shape.window}

    def attend(varied: tuple[Array, Array], cache: KVCache, pos: Array) -> Array:
        q, layer = varied
        return attention(q, cache, layer, pos, **options)

    return _of(attend, (given.q, jnp.int32(LAYER)), given.cache, given.pos)


def _default(given: Inputs) -> Calls:
    return _over_cache(default_ops(jax.devices()[0], jnp.dtype(given.case.dtype)).attention, given)


def _portable(given: Inputs) -> Calls:
    from jaxinfer.pallas.flash_mma import attention_mma

    return _over_cache(attention_mma, given, hopper=float(jax.devices()[0].compute_capability) >= 9)


def _whole(given: Inputs) -> Calls:
    from jaxinfer.pallas.flash import flash_attention

    if given.case.work == "decode":
        raise NotImplementedError("only chunks are run without skipping")
    return _over_cache(flash_attention, given, skip=False)


def _unsplit(given: Inputs) -> Calls:
    from jaxinfer.pallas.flash import flash_attention

    if given.case.work != "decode":
        raise NotImplementedError("only decoding splits keys")
    return _over_cache(flash_attention, given)


def _cudnn(given: Inputs) -> Calls:
    """A whole text is plain causal attention; for a later chunk its mask is a bias."""
    case, bias = given.case, None
    attend = partial(jax.nn.dot_product_attention, scale=given.scale, implementation="cudnn")
    if case.tokens == case.length:
        attend = partial(attend, is_causal=True, local_window_size=(case.window - 1, 0) if case.window else None)
    elif case.tokens > 1:
        bias = jnp.where(given.seen(), 0.0, -jnp.inf).astype(case.dtype)[None, None]
    q = given.q.reshape(case.batch, case.tokens, case.shape.heads, case.shape.width)
    k, v = (a.swapaxes(1, 2) for a in given.in_order())
    return _of(attend, q, k, v, bias)


def _example(given: Inputs) -> Calls:
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
    return _of(lambda q, k, v: attention_mgpu.attention(q, k, v, config), q, k, v)


def _torch(given: Inputs, name: str) -> Calls:
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

    return Calls(output, repeat, wait)


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
        Backend("jaxinfer", never, _default),
        Backend("jaxinfer-no-skip", _no_gpu, _whole),
        Backend("jaxinfer-unsplit", _no_gpu, _unsplit),
        Backend("jaxinfer-mma", _no_gpu, _portable),
        Backend("reference", never, partial(_over_cache, attention_tiles)),
        Backend("cudnn", _no_gpu, _cudnn),
        Backend("pallas-example", _no_example, _example),
        Backend(
            "torch-cudnn", lambda device: _no_gpu(device) or _no_torch(device), partial(_torch, name="CUDNN_ATTENTION")
        ),
        Backend("torch-flash", _no_torch, partial(_torch, name="FLASH_ATTENTION")),
    )
}


COLUMNS = {"shape": -18, "work": -10, "tokens": 7}
BENCHMARK = Benchmark(COLUMNS, cases, BACKENDS, prepare)


def plot(rows: Iterable[Row], path: str | Path) -> None:
    """Draws speed by length, a line for each backend, in axes for each work of a shape.

    The file's type is that of its name, such as .png. Needs matplotlib, which `jaxinfer[plot]` installs.
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports] (optional)
    except ImportError:
        raise ValueError(f"{path}: a plot needs matplotlib: pip install 'jaxinfer[plot]'") from None
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        if row.rate:
            groups.setdefault(row.case.cells[:-1], {}).setdefault(row.backend, []).append(row)
    if not groups:
        raise ValueError(f"{path}: there is nothing to plot: no backend was timed")
    columns = len({work for _, work in groups})
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    for i, ((shape, work), backends) in enumerate(groups.items()):
        axes = figure.add_subplot(lines, columns, 1 + i)
        unit, name = UNITS["bytes" if work.startswith("decode") else "flops"]
        axes.set(title=f"{shape}: {work}", xlabel="tokens", ylabel=name, xscale="log")
        for backend, some in backends.items():
            rate = np.array([row.rate or 0 for row in some]) / unit
            deviation = rate * [(row.stddev_us or 0) / (row.mean_us or 1) for row in some]
            lengths = [int(row.case.cells[-1]) for row in some]
            axes.errorbar(lengths, rate, deviation, label=backend, marker="o", capsize=2)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    figure.savefig(path)
