"""What each layer keeps and which form of every operation it takes, read off the traced programs themselves.

Every operation marks its form in the program, see `ops.form`, and `segments.run` marks the layers. `explain` traces a
chunk of a prefill and a step of decoding with shapes alone and reads those marks: nothing is allocated or run.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import engine
from jaxinfer.cache import KVCache, size_bytes
from jaxinfer.decoder import last_of
from jaxinfer.generate import default_chunk, device_of
from jaxinfer.layers.attention import AttentionParams
from jaxinfer.layers.delta import DeltaParams
from jaxinfer.layers.linear import Linear
from jaxinfer.layers.mlp import MlpParams
from jaxinfer.loader import Description, Loaded, Model
from jaxinfer.memory import placed, show
from jaxinfer.ops import Ops, default_ops
from jaxinfer.ops.experts import ExpertParams
from jaxinfer.quants import Packed
from jaxinfer.tree import Device

PARTS = {AttentionParams: "attention", DeltaParams: "delta net", MlpParams: "feed-forward", ExpertParams: "experts"}
LAYER, OP, FORM = re.compile(r"(layer|sharing) (\d+)"), re.compile(r"op (\w+)"), re.compile(r"\[(.*?)\]")

type Place = tuple[str, int] | None  # of a layer: "layer" or "sharing", and its stack


class Use(NamedTuple):
    """An operation in one program."""

    op: str  # a field of Ops
    function: str
    forms: tuple[str, ...]  # its marks, see `ops.form`; several: a condition decides; none: the function has no marks
    why: str | None  # the function, or what it is given, is not the fastest that there is


class Layer(NamedTuple):
    """Layers that are alike."""

    numbers: tuple[int, ...]
    kind: str
    cache: str  # full, ring, state, shared
    source: int | None  # whose cache it reads, where it is shared
    slots: int  # of the cache that it reads; 0: a state
    size_bytes: int  # of one layer's own cache
    weights: tuple[str, ...]  # of each part the types of its matrices
    prefill: tuple[Use, ...]
    decode: tuple[Use, ...]


class Report(NamedTuple):
    platform: str  # of the device
    dtype: str  # of activations
    tokens: int  # of context
    chunk: int
    layers: tuple[Layer, ...]
    prefill: tuple[Use, ...]  # outside of the layers: the head and, in some models, inputs of all layers
    decode: tuple[Use, ...]


def explain(found: Description | Loaded, ctx: int | None = None, chunk: int | None = None) -> Report:
    """How a row of up to `ctx` tokens, by default the model's context, runs in chunks of up to `chunk`."""
    device = found.device if isinstance(found, Description) else device_of(found.params)
    model, dtype = found.model, str(found.model.config.dtype)
    tokens = model.config.context if ctx is None else ctx
    chunk = default_chunk(device) if chunk is None else chunk
    for name, value in (("ctx", tokens), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    slots, chunk = engine.slots_for(tokens), engine.chunk_for(tokens, chunk)
    params = placed(found.params, isinstance(found, Description) and found.expand)
    cache = jax.eval_shape(lambda p: model.init_cache(p, 1, slots, chunk=chunk), params)
    prefill, decode = (_program(model, params, cache, t, device) for t in (chunk, 1))
    alike: dict[Layer, list[int]] = {}
    for number, (place, layer, stack, source) in enumerate(_layers(params, cache)):
        kept = stack.k.shape[3] if isinstance(stack, KVCache) else 0
        one = Layer(
            numbers=(),
            kind=layer.kind,
            cache="state" if not kept else "shared" if source is not None else "ring" if kept < slots else "full",
            source=source,
            slots=kept,
            size_bytes=0 if source is not None else size_bytes(stack) // jax.tree.leaves(stack)[0].shape[0],
            weights=_weights(layer),
            prefill=prefill(place, layer),
            decode=decode(place, layer),
        )
        alike.setdefault(one, []).append(number)
    layers = tuple(one._replace(numbers=tuple(numbers)) for one, numbers in alike.items())
    head = Linear(params.embedding if params.head is None else params.head)
    return Report(device.platform, dtype, tokens, chunk, layers, prefill(None, head), decode(None, head))


def _layers(params: Any, cache: Any) -> Iterator[tuple[Place, Any, Any, int | None]]:
    """Of each layer in order: its place, parameters, the stack of caches that it reads, and whose, if not its own."""
    own = [k for k, _ in params.layers.places()]
    for k in own:
        yield ("layer", k), params.layers.stacks[k], cache[k], None
    for k, _ in params.sharing.places():
        layer = params.sharing.stacks[k]
        at = last_of(params.layers, layer.kind)
        yield ("sharing", k), layer, cache[at], len(own) - 1 - own[::-1].index(at)


def _program(
    model: Model, params: Any, cache: Any, tokens: int, device: Device
) -> Callable[[Place, Any], tuple[Use, ...]]:
    """Traces a call of so many tokens. What it returns tells of a place, and the parameters there, what is done."""

    def call(params: Any, tokens: Any, pos: Any, cache: Any) -> Any:
        x, cache = marked.forward(params, tokens, pos, cache)
        return marked.logits(params, x[:, -1:]), cache

    marked = replace(model, ops=_marked(model.ops))
    ints = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    found: dict[tuple[Place, str], dict[str, None]] = {}  # the marks under each operation, in order
    for path in dict.fromkeys(_paths(jax.make_jaxpr(call)(params, ints, ints, cache).jaxpr, "")):
        if op := OP.search(path):
            layer, form = LAYER.search(path), FORM.search(path, op.end())
            place = (layer[1], int(layer[2])) if layer else None
            found.setdefault((place, op[1]), {}).update({form[1]: None} if form else {})

    def uses(place: Place, layer: Any) -> tuple[Use, ...]:
        out = []
        for op, function in model.ops._asdict().items():
            if (forms := found.get((place, op))) is not None:
                why = _slower(op, function, device, model.config.dtype, _packed(layer))
                out.append(Use(op, _name(function), tuple(forms), why))
        return tuple(out)

    return uses


def _marked(ops: Ops) -> Ops:
    """Operations that put their field's name into what is traced, so that one without marks of its own shows."""

    return Ops(**{op: jax.named_scope(f"op {op}")(function) for op, function in ops._asdict().items()})


def _name(function: Any) -> str:
    return getattr(function, "__name__", None) or _name(getattr(function, "func", type(function)))


def _paths(jaxpr: Any, outer: str) -> Iterator[str]:
    """The scopes of every equation, from the outermost in."""
    for eqn in jaxpr.eqns:
        path = f"{outer}/{eqn.source_info.name_stack}"
        yield path
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from _paths(getattr(inner, "jaxpr", inner), path)


def _slower(op: str, function: Any, device: Device, dtype: np.dtype, packed: bool) -> str | None:
    """Why an operation, or what it is given, is not the fastest that there is for a device, if so."""
    best = getattr(default_ops(device, jnp.dtype(jnp.bfloat16)), op)
    if function is not best:
        if function is getattr(default_ops(device, dtype), op):
            return "the kernels take bfloat16 and float16 alone"
        return f"{_name(best)} is the fastest on this device"
    if device.platform == "cpu" and op in ("matmul", "project") and packed:
        return "packed weights are decoded for every product"
    return None


def _matrices(part: Any) -> list[Any]:
    if isinstance(part, ExpertParams):
        return [w for w in (part.gate, part.up, part.down) if w is not None]
    linears = jax.tree.leaves(part, is_leaf=lambda x: isinstance(x, Linear))
    return [x.weight for x in linears if isinstance(x, Linear)]


def _packed(layer: Any) -> bool:
    """Whether one of a layer's products, but for those of experts, has a packed weight."""
    return any(isinstance(w, Packed) for w in _matrices(layer))


def _weights(layer: Any) -> tuple[str, ...]:
    types: dict[str, dict[str, None]] = {}
    for part in jax.tree.leaves(layer, is_leaf=lambda x: isinstance(x, tuple(PARTS))):
        if name := PARTS.get(type(part)):
            found = (w.format.name if isinstance(w, Packed) else str(w.dtype) for w in _matrices(part))
            types.setdefault(name, {}).update(dict.fromkeys(found))
    return tuple(f"{name} {', '.join(sorted(found))}" for name, found in types.items())


def lines(report: Report) -> Iterator[str]:
    """The report as text."""
    yield f"{report.platform}, {report.dtype}: {report.tokens} tokens in chunks of {report.chunk}"
    for layer in report.layers:
        yield f"{'layers' if len(layer.numbers) > 1 else 'layer'} {_ranges(layer.numbers)}: {layer.kind}"
        slots = f" of {layer.slots} slots" if layer.slots else ""
        whose = f"layer {layer.source}'s" if layer.source is not None else f"{show(layer.size_bytes)} a layer"
        yield f"  cache    {layer.cache}{slots}, {whose}"
        yield f"  weights  {'; '.join(layer.weights)}"
        yield from _words(layer.prefill, layer.decode)
    yield "outside of the layers"
    yield from _words(report.prefill, report.decode)


def _words(prefill: Sequence[Use], decode: Sequence[Use]) -> Iterator[str]:
    """A line for each operation, or one for each program where they differ."""
    both = [use for use in prefill if use in decode]
    for program, uses in (("both", both), ("prefill", prefill), ("decode", decode)):
        for use in uses:
            if program == "both" or use not in both:
                forms = f" ({' | '.join(use.forms)})" if use.forms else ""
                yield f"  {program:<8} {use.op}: {use.function}{forms}{f'; {use.why}' if use.why else ''}"


def _ranges(numbers: Sequence[int]) -> str:
    """`0-4, 6-10`."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))
