"""Products with packed weights alone, in the shapes of models: what `ops` picks, each of our kernels, and XLA's.

Weights are cold: the calls of a program walk through stacks that no cache holds, as the layers of a model do.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from jaxtyping import Array, Float

from jaxinfer.gguf import Tensor
from jaxinfer.ops import default_ops
from jaxinfer.ops.matmul import FEW, MOST, matmul_gpu, matmul_hopper, matmul_reference
from jaxinfer.pallas import grouped, matvec
from jaxinfer.quants import FORMATS, PLAIN, Packed, Weight, at, dense, pack
from jaxinfer.timing import KEPT, SHORT_S, Backend, Benchmark, Bound, Calls, Ceilings, never, normal, of_jax, relative

KINDS = {t.name: t for t in (*FORMATS, GGMLQuantizationType.BF16, GGMLQuantizationType.F16)}
ROWS = (1, 2, 4, 8, 16, 64, 512, 2048, 8192)
COLD_BYTES = 2**28  # that are read between two reads of a weight: five times the second-level cache of an H200
POOL_BYTES = 2**24  # of random blocks, which are repeated
CHECKED = 128  # rows and columns of a result that are compared
# Relative L2 errors. Of 16 bits: three times what it is to round both weights and results to bfloat16, 1.6e-3 each; a
# block of 32 left out of rows of 21,504 is 4e-2. Of float32: sums over that many.
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-7, "float32": 1e-5}
FASTEST = 1e15  # FLOP/s that no device reaches: so a call of more work is not one of the short ones


class Shape(NamedTuple):
    """A weight, and how many rows and columns it has."""

    name: str
    out: int
    into: int


# All dense products of these models but their routers: the experts of the last one are another operation's.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-8b-q", 4096, 4096),  # and o
        Shape("qwen3-8b-kv", 1024, 4096),  # k, and v
        Shape("qwen3-8b-gate", 12288, 4096),  # and up
        Shape("qwen3-8b-down", 4096, 12288),
        Shape("qwen3-8b-head", 151936, 4096),
        Shape("gemma4-31b-sliding-q", 8192, 5376),
        Shape("gemma4-31b-sliding-kv", 4096, 5376),
        Shape("gemma4-31b-sliding-o", 5376, 8192),
        Shape("gemma4-31b-global-q", 16384, 5376),
        Shape("gemma4-31b-global-k", 2048, 5376),  # which is v too
        Shape("gemma4-31b-global-o", 5376, 16384),
        Shape("gemma4-31b-gate", 21504, 5376),
        Shape("gemma4-31b-down", 5376, 21504),
        Shape("gemma4-31b-head", 262144, 5376),
        Shape("qwen3-30b-a3b-q", 4096, 2048),
        Shape("qwen3-30b-a3b-kv", 512, 2048),
        Shape("qwen3-30b-a3b-o", 2048, 4096),
        Shape("qwen3-30b-a3b-head", 151936, 2048),
    )
}


def shape_of(text: str) -> Shape:
    """A shape by its name, or as OUTxIN."""
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split("x")
    if len(sizes) != 2 or not all(n.isdecimal() and int(n) for n in sizes):
        raise ValueError(f"{text!r} is no shape: known are {', '.join(SHAPES)}, or OUTxIN such as 12288x4096")
    return Shape(text, *map(int, sizes))


class Case(NamedTuple):
    """`rows` of activations times a weight."""

    format: str
    shape: Shape
    rows: int
    dtype: str

    @property
    def cells(self) -> tuple[str, ...]:
        return self.format, self.shape.name, str(self.rows)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.shape.out * self.shape.into

    @property
    def weight_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[KINDS[self.format]]
        return self.shape.out * self.shape.into // block * size

    @property
    def plain_bytes(self) -> int:
        """Of the weight in bfloat16."""
        return 2 * self.shape.out * self.shape.into

    def bound(self, ceiling: Ceilings) -> tuple[Bound, int]:
        """The weight's bytes or the operations, whichever take the longer; they are the same for all backends."""
        by_bytes = self.weight_bytes / ceiling.bytes > self.flops / ceiling.flops
        return ("bytes", self.weight_bytes) if by_bytes else ("flops", self.flops)

    @property
    def need_bytes(self) -> int:
        """What the arrays take at once: stacks, weights of bfloat16, one decoded in float32, results twice."""
        plain, item = copies(self.plain_bytes), jnp.dtype(self.dtype).itemsize
        kept = max(KEPT, plain) if self.flops < FASTEST * SHORT_S else 1
        weights = (2 + math.prod(spread(self.weight_bytes))) * self.weight_bytes + (plain + 2) * self.plain_bytes
        return weights + self.rows * (self.shape.into + 2 * kept * self.shape.out) * item


def copies(size: int) -> int:
    """As many weights of so many bytes as no cache holds, within what a program may unroll."""
    return next((n for n in (2, 4, 8, 16, 32, 64) if n * size >= COLD_BYTES), 128)


def spread(size: int) -> tuple[int, int]:
    """The same in stacks: how many, and of how many layers."""
    stacks = min(copies(size), KEPT)
    return stacks, max(2, math.ceil(COLD_BYTES / (stacks * size)))


def cases(
    *,
    formats: Sequence[str] = tuple(KINDS),
    shapes: Sequence[str] = tuple(SHAPES),
    rows: Sequence[int] = ROWS,
    dtype: str = "bfloat16",
) -> list[Case]:
    """Every format of every shape, by every number of rows."""
    if wrong := [name for name in formats if name not in KINDS]:
        raise ValueError(f"{wrong} are no formats; known are {', '.join(KINDS)}")
    if wrong := [n for n in rows if n < 1]:
        raise ValueError(f"rows must be at least 1, not {wrong}")
    found = [Case(f, shape, n, dtype) for f, shape, n in product(formats, map(shape_of, shapes), rows)]
    for case in found:
        block, _ = GGML_QUANT_SIZES[KINDS[case.format]]
        if case.shape.into % block:
            raise ValueError(f"{case.shape.name!r}: {case.shape.into} is no multiple of {block}, {case.format}'s block")
    return found


class Inputs(NamedTuple):
    case: Case
    x: Float[Array, "1 M D"]
    w: Weight  # [2, F, D]
    wanted: np.ndarray  # f64, of some rows and columns of x w[1].T


def blocks(kind: GGMLQuantizationType, into: int, size: int, seed: int) -> np.ndarray:
    """`size` bytes of random blocks, whose values are about into**-0.5 in size."""
    rng = np.random.default_rng(seed)
    if kind in PLAIN:
        values = rng.standard_normal(min(size, POOL_BYTES) // 2, np.float32) * np.float32(into**-0.5)
        return np.resize(values.astype(PLAIN[kind]).view(np.uint8), size)
    form = FORMATS[kind]
    raw = np.frombuffer(bytearray(rng.bytes(min(size, POOL_BYTES) // form.size * form.size)), np.uint8)
    raw = raw.reshape(-1, form.size)
    halves = [plane for plane in form.split(raw).values() if plane.dtype == np.float16]
    for plane in halves:  # random bits would be infinities and nan, too
        plane[...] = rng.uniform(0.5, 1, plane.shape)
    if kind == GGMLQuantizationType.MXFP4:  # exponents, of 2**-9 to 2**-7
        form.split(raw)["e"][...] = rng.integers(119, 122, (len(raw), 1))
    scale = into**-0.5 / dequantize(raw[:1024], kind).std()
    for plane in halves:
        plane[...] *= scale
    return np.resize(raw, size)


def inputs(case: Case) -> Inputs:
    """Random ones. Two layers are made on the host, and the second is checked, with gguf-py's decoder."""
    kind, (_, out, into) = KINDS[case.format], case.shape
    data = [blocks(kind, into, case.weight_bytes, seed).reshape(out, -1) for seed in range(2)]
    w = jax.device_put(pack([Tensor(f"layer {i}", kind, (out, into), raw) for i, raw in enumerate(data)]))
    x = normal(jax.random.key(0), (1, case.rows, into), case.dtype)
    rows, columns = sample(case)
    some = dequantize(data[1][columns], kind).astype(np.float64)
    return Inputs(case, x, w, np.asarray(x[0, rows], np.float64) @ some.T)


def sample(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a result that are checked, the first and the last among them."""
    rows, columns = (np.linspace(0, n - 1, min(n, CHECKED)).astype(int) for n in (case.rows, case.shape.out))
    return rows, columns


def prepare(case: Case) -> tuple[Inputs, Callable[[Array], float]]:
    """A case's arrays, and what gives the error of a result."""
    given, (rows, columns) = inputs(case), sample(case)
    return given, lambda o: relative(o[0, rows[:, None], columns], given.wanted)


@partial(jax.jit, static_argnums=1)
def stack(w: Any, layers: int) -> Any:
    """Of a weight or a tree of them: the first of two layers again and again, and the second one last."""
    return jax.tree.map(lambda plane: plane[np.arange(layers) // (layers - 1)], w)


def _of(matmul: Callable[..., Array], given: Inputs) -> Calls:
    """Of one with the signature of `matmul_reference`."""
    stacks, layers = spread(given.case.weight_bytes)
    return of_jax(matmul, given.x, [stack(given.w, layers) for _ in range(stacks)], layers)


def _default(given: Inputs) -> Calls:
    return _of(default_ops(jax.devices()[0], jnp.dtype(given.case.dtype)).matmul, given)


def _few(given: Inputs) -> Calls:
    if given.case.rows > MOST or not isinstance(given.w, Packed):
        raise NotImplementedError(f"packed weights and up to {MOST} rows alone")
    return _kernel(matvec.product, given)


def _kernel(product: Callable[..., tuple[Array, ...]], given: Inputs) -> Calls:
    """A kernel for whatever number of rows, and not just those that `ops` would give it."""
    if default_ops(jax.devices()[0], jnp.dtype(given.case.dtype)).matmul is not matmul_hopper:
        raise NotImplementedError("16 bits on Hopper alone")
    return _of(lambda x, w, layer: product(x[0], [[w]], layer, dtype=x.dtype)[0][None], given)


def _sum(given: Inputs) -> Calls:
    if given.case.rows > FEW:
        raise NotImplementedError(f"more than {FEW} rows")
    return _of(matmul_gpu, given)


def _plain(given: Inputs) -> Calls:
    """Weights that are decoded before, each an array of its own: nothing is copied out of a stack."""
    if given.case.dtype != "bfloat16":
        raise NotImplementedError("activations of bfloat16 alone")
    decode = jax.jit(lambda w: dense(at(w, 1), jnp.bfloat16))
    weights = [decode(given.w) for _ in range(copies(given.case.plain_bytes))]
    return of_jax(lambda x, w, _: matmul_reference(x, w), given.x, weights)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("jaxinfer", never, _default),
        Backend("few-rows", never, _few),
        Backend("many-rows", never, partial(_kernel, grouped.ungrouped)),
        Backend("xla-dot", never, partial(_of, matmul_reference)),
        Backend("xla-sum", never, _sum),
        Backend("bf16-dot", never, _plain),
    )
}
COLUMNS = {"format": -6, "shape": -22, "rows": 4}
BENCHMARK = Benchmark(COLUMNS, cases, BACKENDS, prepare)
