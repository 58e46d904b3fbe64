"""Experts alone, in the shapes of models: their products, sums and choice, ours beside XLA's.

Weights are cold, as in the benchmark of products: from call to call as many tokens choose other experts.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.bench_matmul import FASTEST, KINDS, TOLERANCE, blocks, copies, spread, stack
from jaxinfer.gguf import Tensor
from jaxinfer.layers.mlp import silu_gate
from jaxinfer.layers.routing import softmax_renormalised
from jaxinfer.ops import default_ops
from jaxinfer.ops.experts import ExpertParams, experts_gpu, experts_hopper, group, layout_tile, tile_of, tiles
from jaxinfer.ops.matmul import MOST
from jaxinfer.ops.route import route_reference
from jaxinfer.pallas import grouped, limbs, matvec
from jaxinfer.pallas.reduce import reduce, reduce_reference
from jaxinfer.quants import Packed, Weight, at, dense, pack
from jaxinfer.timing import KEPT, SHORT_S, Backend, Benchmark, Bound, Calls, Ceilings, never, normal, of_jax, relative

WORKS = ("up", "layer", "reduce", "route")  # x -> F; all of an expert and the sum; the sum; the choice
SKEWS = ("uniform", "zipf", "one")  # experts alike, the n-th by 1/n, and the same for all tokens
TOKENS = (1, 4, 16, 64, 512, 2048, 4096, 8192, 32768)
NONE = "-"  # a work's format or skew, where it has none
CHECKED, CHECKED_TOKENS, CHECKED_COLUMNS = 64, 4, 256  # rows of a result that are compared; those of `layer`; of all


class Shape(NamedTuple):
    """The experts of a layer: how many there are, those of a token, and their widths."""

    name: str
    experts: int
    used: int
    width: int
    ffn: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", 128, 8, 2048, 768),
        Shape("qwen3.6-35b-a3b", 256, 8, 2048, 512),
        Shape("gpt-oss-20b", 32, 4, 2880, 2880),
        Shape("gemma4-26b-a4b", 128, 8, 2816, 704),
        Shape("olmoe", 64, 8, 2048, 1024),
    )
}


def shape_of(text: str) -> Shape:
    """A shape by its name, or as experts/those of a token/width/their width."""
    if text in SHAPES:
        return SHAPES[text]
    numbers = text.split("/")
    if len(numbers) != 4 or not all(n.isdecimal() and int(n) for n in numbers):
        raise ValueError(f"{text!r} is no shape: known are {', '.join(SHAPES)}, or E/A/D/F such as 128/8/2048/768")
    found = Shape(text, *map(int, numbers))
    if found.used > found.experts:
        raise ValueError(f"{text!r} is no shape: a token has {found.used} of {found.experts} experts")
    return found


class Case(NamedTuple):
    """A work for so many tokens."""

    shape: Shape
    work: str
    format: str
    skew: str
    tokens: int
    dtype: str

    @property
    def cells(self) -> tuple[str, ...]:
        return self.format, self.shape.name, self.work, self.skew, str(self.tokens)

    @property
    def tolerance(self) -> float:
        """Rounding hidden values, too, leaves a layer of 16 bits at 2.5e-3; one wrong choice of 8 is 0.1 off."""
        return TOLERANCE[self.dtype]

    @property
    def rows(self) -> int:
        """Choices of all tokens."""
        return self.tokens * self.shape.used

    @property
    def weights(self) -> list[tuple[int, int]]:
        """Rows and columns of an expert's weights, as far as they are used."""
        up = self.shape.ffn, self.shape.width
        return {"up": [up], "layer": [up, up, up[::-1]]}.get(self.work, [])

    @property
    def result(self) -> tuple[int, int]:
        """Rows and columns of it; a choice is a row of all experts' weights."""
        _, experts, _, width, ffn = self.shape
        columns = {"up": ffn, "route": experts}.get(self.work, width)
        return (self.rows if self.work == "up" else self.tokens), columns

    @property
    def elements(self) -> int:
        """Of an expert's weights."""
        return sum(out * into for out, into in self.weights)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.elements

    @property
    def weight_bytes(self) -> int:
        """Of all experts."""
        block, size = GGML_QUANT_SIZES[KINDS[self.format]]
        return self.shape.experts * self.elements // block * size

    @property
    def plain_bytes(self) -> int:
        """The same in bfloat16."""
        return 2 * self.shape.experts * self.elements

    @property
    def moved_bytes(self) -> int:
        """What has to be read and written beside weights; a choice is an index and a weight."""
        _, experts, _, width, ffn = self.shape
        item, choices = jnp.dtype(self.dtype).itemsize, 8 * self.rows
        return {
            "up": self.rows * (width + ffn) * item,
            "layer": 2 * self.tokens * width * item + choices,
            "reduce": (self.rows + self.tokens) * width * item + choices,
            "route": 4 * self.tokens * experts + choices,
        }[self.work]

    def bound(self, ceiling: Ceilings) -> tuple[Bound, int]:
        """The operations or the bytes, weights of experts that nobody chose left out: whichever take the longer."""
        size = self.moved_bytes
        if self.weights:
            size += self.weight_bytes // self.shape.experts * len(np.unique(choices(self)))
        return ("bytes", size) if size / ceiling.bytes > self.flops / ceiling.flops else ("flops", self.flops)

    @property
    def need_bytes(self) -> int:
        """What the arrays take at once: stacks, decoded weights and one in float32, rows of choices, results twice."""
        _, _, _, width, ffn = self.shape
        item, size = jnp.dtype(self.dtype).itemsize, 0
        if self.weights:
            size = (2 + math.prod(spread(self.weight_bytes))) * self.weight_bytes
            size += (held(self.plain_bytes) + 2) * self.plain_bytes
        row = width * (held(self.rows * width * item) if self.work == "reduce" else 3) + 3 * ffn
        kept = KEPT if self.flops < FASTEST * SHORT_S else 1
        return size + (self.rows * row + 2 * kept * math.prod(self.result)) * item


def held(size: int) -> int:
    """As many arrays of so many bytes as no cache holds, within what a round of calls reads."""
    return min(copies(size), KEPT)


def cases(
    *,
    shapes: Sequence[str] = tuple(SHAPES),
    works: Sequence[str] = WORKS,
    formats: Sequence[str] = tuple(KINDS),
    skews: Sequence[str] = SKEWS,
    tokens: Sequence[int] = TOKENS,
    dtype: str = "bfloat16",
) -> list[Case]:
    """Every work of every shape by every number of tokens; in every format whose blocks make up the rows of weights."""
    for name, values, known in (("works", works, WORKS), ("formats", formats, KINDS), ("skews", skews, SKEWS)):
        if wrong := [value for value in values if value not in known]:
            raise ValueError(f"{wrong} are no {name}; known are {', '.join(known)}")
    if wrong := [n for n in tokens if n < 1]:
        raise ValueError(f"tokens must be at least 1, not {wrong}")
    found = []
    for shape, work in product(map(shape_of, shapes), works):
        kinds = formats if work in ("up", "layer") else [NONE]
        some = product([shape], [work], kinds, skews if work != "route" else [NONE], tokens, [dtype])
        found += [case for case in map(Case._make, some) if _whole(case)]
    if not found:
        raise ValueError(f"there is nothing to run: rows of {list(shapes)} are no whole blocks of {list(formats)}")
    return found


def _whole(case: Case) -> bool:
    return all(into % GGML_QUANT_SIZES[KINDS[case.format]][0] == 0 for _, into in case.weights)


def choices(case: Case) -> Int[np.ndarray, "M A"]:
    """Each token's experts: a draw without replacement is whose exponential clocks are the first."""
    _, experts, used, *_ = case.shape
    if case.skew == "one":  # a product alone has all its rows with one expert, a token no expert twice
        return np.tile(np.arange(used, dtype=np.int32) * (case.work != "up"), (case.tokens, 1))
    clocks = np.random.default_rng(0).standard_exponential((case.tokens, experts), np.float32)
    if case.skew == "zipf":
        clocks *= np.arange(1, experts + 1, dtype=np.float32)
    return np.argpartition(clocks, used - 1)[:, :used].astype(np.int32)


class Inputs(NamedTuple):
    case: Case
    x: Float[Array, "n _"]  # activations [M, D]; of `reduce` rows by expert [M A, D]; of `route` f32 scores [M, E]
    w: ExpertParams | Weight | None  # [2, E, F, D] and the like
    chosen: Int[Array, "M A"]
    weights: Float[Array, "M A"]
    valid: Bool[Array, " M"]  # all of them
    wanted: np.ndarray  # f64, of some rows and columns of the result with the second layer


def sample(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a result that are checked, the first and the last among them."""
    most = CHECKED_TOKENS if case.work == "layer" else CHECKED, CHECKED_COLUMNS
    rows, columns = (np.linspace(0, n - 1, min(n, m)).astype(int) for n, m in zip(case.result, most, strict=True))
    return rows, columns


def inputs(case: Case) -> Inputs:
    """Random ones; of weights two layers are made on the host, and the second is checked, with gguf-py's decoder."""
    _, experts, used, width, _ = case.shape
    shape = {"reduce": (case.rows, width), "route": (case.tokens, experts)}.get(case.work, (case.tokens, width))
    x = normal(jax.random.key(0), shape, "float32" if case.work == "route" else case.dtype)
    weights = np.random.default_rng(1).uniform(0, 2 / used, (case.tokens, used)).astype(np.float32)
    stacks, data = [], []
    for i, (out, into) in enumerate(case.weights):
        kind, size = KINDS[case.format], case.weight_bytes // len(case.weights)
        layers = [blocks(kind, into, size, seed).reshape(experts, out, -1) for seed in (2 * i, 2 * i + 1)]
        stacks.append(jax.device_put(pack([Tensor("w", kind, (experts, out, into), raw) for raw in layers])))
        data.append(layers[1])
    w = ExpertParams(*stacks) if len(stacks) > 1 else stacks[0] if stacks else None
    chosen = choices(case)
    wanted = expected(case, np.asarray(x), data, chosen, weights)
    return Inputs(case, x, w, jnp.asarray(chosen), jnp.asarray(weights), jnp.ones(case.tokens, bool), wanted)


def expected(
    case: Case, x: np.ndarray, data: Sequence[np.ndarray], chosen: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The rows and columns of the result that are checked, in float64."""
    (rows, columns), used, wide = sample(case), case.shape.used, partial(np.asarray, dtype=np.float64)

    def times(w: np.ndarray, e: Any, x: np.ndarray, some: Any = slice(None)) -> np.ndarray:
        return dequantize(w[e, some], KINDS[case.format]).astype(np.float64) @ x

    def expert(e: Any, x: np.ndarray) -> np.ndarray:
        gate, up, down = data
        g = times(gate, e, x)
        return times(down, e, g / (1 + np.exp(-g)) * times(up, e, x), columns)

    match case.work:
        case "up":
            return np.array([times(data[0], chosen[r // used, r % used], wide(x[r // used]), columns) for r in rows])
        case "layer":
            return np.array([weights[m] @ [expert(e, wide(x[m])) for e in chosen[m]] for m in rows])
        case "reduce":
            place = np.argsort(np.argsort(chosen.reshape(-1), kind="stable")).reshape(chosen.shape)
            return np.array([weights[m] @ wide(x[place[m][:, None], columns]) for m in rows])
    scores = np.exp(wide(x[rows]))
    kept = scores * (np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1) < used)
    return (kept / kept.sum(1, keepdims=True))[:, columns]


def prepare(case: Case) -> tuple[Inputs, Callable[[Array], float]]:
    """A case's arrays, and what gives the error of a result."""
    given, (rows, columns) = inputs(case), sample(case)
    return given, lambda o: relative(o[rows[:, None], columns], given.wanted)


def _walk(
    given: Inputs,
    call: Callable[..., Array],
    varied: Any,
    of: Callable[[Array], Any],
    stacks: Sequence[Any],
    layers: int = 1,
) -> Calls:
    """Of call(varied, (stack, of(chosen)), layer): from call to call all tokens choose the A-th next expert."""
    _, experts, used, *_ = given.case.shape
    turns = [of((given.chosen + i * used) % experts) for i in reversed(range(KEPT))]  # the last is the one checked
    return of_jax(call, varied, [(stacks[i % len(stacks)], turn) for i, turn in enumerate(turns)], layers)


def by_expert(chosen: Int[Array, "M A"], experts: int) -> tuple[Int[Array, " n"], Int[Array, " E"], Int[Array, "M A"]]:
    """Choices by expert, how many each has, and where a choice is among them."""
    order, starts, *_ = group(chosen, jnp.ones(len(chosen), bool), experts)
    return order, jnp.diff(starts), jnp.argsort(order).reshape(chosen.shape)


def _stacks(given: Inputs) -> tuple[list[Any], int]:
    """Packed weights, and of how many layers."""
    stacks, layers = spread(given.case.weight_bytes)
    return [stack(given.w, layers) for _ in range(stacks)], layers


def _plain(given: Inputs) -> tuple[list[Any], int]:
    """Weights [E, in, out] that are decoded before, each an array of its own: nothing is copied out of a stack."""
    decode = jax.jit(lambda w: dense(at(w, 1), given.case.dtype).swapaxes(1, 2))
    one = partial(jax.tree.map, decode, given.w, is_leaf=lambda w: isinstance(w, Packed))
    return [one() for _ in range(held(given.case.plain_bytes))], 1


def _layer(experts: Callable[..., Array], given: Inputs, stacks: Sequence[Any], layers: int) -> Calls:
    """Of one with the signature of `experts_reference`."""

    def call(varied: tuple[Array, ...], operands: tuple[Any, Array], layer: Array) -> Array:
        (x, weights, valid), (w, chosen) = varied, operands
        return experts(w, layer, x, chosen, weights, valid, activation=silu_gate, dtype=x.dtype)

    return _walk(given, call, (given.x, given.weights, given.valid), lambda chosen: chosen, stacks, layers)


def _up(multiply: Callable[..., Array], given: Inputs, x: Array, tile: int) -> Calls:
    """Of one with the signature of `grouped.reference`, on rows of x that are laid out before."""

    @jax.jit
    def laid(chosen: Array) -> Any:
        return tiles(chosen, given.valid, given.case.shape.experts, tile)

    def call(x: Array, operands: tuple[Weight, Array], layer: Array) -> Array:
        w, starts = operands
        return multiply(x, [w], layer, starts, tile=tile, dtype=x.dtype)

    own = laid(given.chosen)
    calls = _walk(given, call, x[own.source], lambda chosen: laid(chosen).starts, *_stacks(given))
    return calls._replace(output=lambda: calls.output()[own.place.reshape(-1)])


def _few(given: Inputs) -> Calls:
    """The product of few rows, choice by choice, with what makes integers of activations."""

    def call(x: Array, operands: tuple[Packed, Array], layer: Array) -> Array:
        w, experts = operands
        return matvec.product(limbs.limbs(x, None, layer, None), [[w]], layer, experts=experts, dtype=x.dtype)[0]

    return _walk(given, call, given.x, jnp.ravel, *_stacks(given))


def _reduce(add: Callable[..., Array], given: Inputs) -> Calls:
    """Of one with the signature of `reduce_reference`."""

    def call(varied: tuple[Array, Array], operands: tuple[Array, Array], _: Array) -> Array:
        (weights, valid), (rows, place) = varied, operands
        return add(rows, place, weights, valid, dtype=rows.dtype)

    def place(chosen: Array) -> Array:
        return by_expert(chosen, given.case.shape.experts)[2]

    rows = [jnp.copy(given.x) for _ in range(held(given.x.nbytes))]
    return _walk(given, call, (given.weights, given.valid), place, rows)


def _route(route: Callable[..., tuple[Array, Array]], given: Inputs) -> Calls:
    """Of one with the signature of `route_reference`."""
    used = given.case.shape.used
    calls = of_jax(lambda scores, *_: route(scores, used, softmax_renormalised), given.x, [None])

    def output() -> Array:
        chosen, weights = calls.output()
        return jnp.zeros_like(given.x).at[jnp.arange(len(chosen))[:, None], chosen].set(weights)

    return calls._replace(output=output)


def _default(given: Inputs) -> Calls:
    case, w = given.case, given.w
    ops = default_ops(jax.devices()[0], jnp.dtype(case.dtype))
    if case.work == "layer":
        return _layer(ops.experts, given, *_stacks(given))
    if case.work == "route":
        return _route(ops.route, given)
    if ops.experts is not experts_hopper:
        raise NotImplementedError("a kernel for 16 bits on Hopper alone")
    if case.work == "reduce":
        return _reduce(reduce, given)
    packed = isinstance(w, Packed)
    if packed and case.tokens <= MOST:
        return _few(given)
    x = grouped.permuted(given.x) if packed else given.x
    return _up(grouped.grouped, given, x, layout_tile(case.rows, case.shape.experts))


def _xla(given: Inputs) -> Calls:
    """A loop over experts or their tiles, which decodes the weights of each; what defines the other works."""
    match given.case.work:
        case "up":
            return _up(grouped.reference, given, given.x, tile_of(given.case.rows, given.case.shape.experts))
        case "layer":
            return _layer(experts_gpu, given, *_stacks(given))
        case "reduce":
            return _reduce(reduce_reference, given)
    return _route(route_reference, given)


def _ragged(given: Inputs) -> Calls:
    case = given.case
    if not case.weights:
        raise NotImplementedError("works with weights alone")
    if case.work == "layer":
        return _layer(_experts_ragged, given, *_plain(given))

    def call(x: Array, operands: tuple[Array, Array], _: Array) -> Array:
        return lax.ragged_dot(x, *operands)

    def sizes(chosen: Array) -> Array:
        return by_expert(chosen, case.shape.experts)[1]

    order, _, place = by_expert(given.chosen, case.shape.experts)
    calls = _walk(given, call, given.x[order // case.shape.used], sizes, *_plain(given))
    return calls._replace(output=lambda: calls.output()[place.reshape(-1)])


def _experts_ragged(
    p: Any,
    _: Array,
    x: Array,
    chosen: Array,
    weights: Array,
    valid: Array,
    *,
    activation: Callable[[Array, Array], Array],
    **options: Any,
) -> Array:
    """`experts_reference` with weights [E, in, out]."""
    order, sizes, place = by_expert(chosen, len(p.down))
    rows = x[order // chosen.shape[1]]
    h = activation(lax.ragged_dot(rows, p.gate, sizes), lax.ragged_dot(rows, p.up, sizes))
    return reduce_reference(lax.ragged_dot(h, p.down, sizes), place, weights, valid, **options)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("jaxinfer", never, _default),
        Backend("xla", never, _xla),
        Backend("ragged-dot", never, _ragged),
    )
}
COLUMNS = {"format": -6, "shape": -15, "work": -6, "skew": -7, "tokens": 6}
BENCHMARK = Benchmark(COLUMNS, cases, BACKENDS, prepare)
